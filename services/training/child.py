"""The process that trains: `python -m services.training.child`, one per job, talking over its standard streams.

A crash or an out-of-memory kill ends this process and not the service. It ends with the service too: the kernel kills
it when its parent dies, and so does the end of its standard input, which holds where the former does not (a parent
that dies before this process has asked the kernel).
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from importlib import import_module
from typing import Any, BinaryIO, Final

from services.training import dialogue

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Train what the first line of standard input says, and answer on standard output."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        first = sys.stdin.buffer.readline()
        if not first:
            return
        commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(sys.stdin.buffer, commands), daemon=True).start()
        session = import_module("services.training.session")  # torch takes seconds; the lifeline is held by now
        session.run(dialogue.from_line(first), commands, lambda message: answers.write(dialogue.to_line(message)))


def _listen(stream: BinaryIO, commands: queue.SimpleQueue[Any]) -> None:
    for line in stream:
        commands.put(dialogue.from_line(line))
    os._exit(0)  # the service is gone, or wants us gone


if __name__ == "__main__":
    main()
