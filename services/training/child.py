"""The process that trains: `python -m services.training.child`, one per job and device.

It talks over its standard streams; of a gang rank 0 does, and the others tell nothing but what stops them. A crash or
an out-of-memory kill ends this process and not the service. It ends with the service too: the kernel kills it when its
parent dies, and so does the end of its standard input, which holds where the former does not (a parent that dies before
this process has asked the kernel).
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from importlib import import_module
from typing import Any, BinaryIO, Final

from services.residency import gang
from services.training import dialogue

START: Final = "start"
"""Where rank 0 leaves its first line for the others."""


def main() -> None:
    """Train what the first line of standard input says, and answer on standard output."""
    gang.die_with_parent()
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    first = b""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        if gang.rank() == 0:
            first = sys.stdin.buffer.readline()
            if not first:
                sys.exit(1)
            threading.Thread(target=_listen, args=(sys.stdin.buffer, commands), daemon=True).start()
        session = import_module("services.training.session")  # torch takes seconds; the lifeline is held by now
        with gang.joined() as store:
            if store is not None and gang.rank() == 0:
                store.set(START, first)
            start = dialogue.from_line(first if store is None else store.get(START))
            session.run(start, commands, lambda message: answers.write(dialogue.to_line(message)))


def _listen(stream: BinaryIO, commands: queue.SimpleQueue[Any]) -> None:
    for line in stream:
        commands.put(dialogue.from_line(line))
    os._exit(1)  # the service is gone, or wants us gone


if __name__ == "__main__":
    main()
