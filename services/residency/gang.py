"""Processes that train together, one per device: how they are started, how they meet, and that they end together.

`python -m services.residency.gang MODULE DEVICE…` is their launcher. It starts MODULE once per device through torch's
elastic layer, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK); standard streams are inherited. There is no
rendezvous server, for torchrun's listens on every interface and asks nobody who he is: the ranks of one machine meet in
a file, and talk over the loopback interface.

When a rank ends badly the others are ended, and the launcher ends the way that one did. Elastic gives every rank a
session of its own, so no signal reaches them all: each asks the kernel to die with the launcher, and the launcher to
die with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.residency.lines import Words

PR_SET_PDEATHSIG: Final = 1
POLL_SECONDS: Final = 0.1
DRAIN_SECONDS: Final = 5
MEETING: Final = "LENSMESH_GANG_MEETING"
"""File in which the ranks meet."""
LAUNCHER: Final = "LENSMESH_GANG_LAUNCHER"
"""Process id of the launcher."""
START: Final = "start"
"""Where rank 0 leaves its first line for the others."""
PATIENCE: Final = timedelta(days=1)
"""For how long ranks wait for each other: rank 0 waits for its service, and who dies ends them all."""
CUDA_CONTEXT_BYTES: Final = 600_000_000
"""What another process takes on a GPU before it allocates anything."""


def program(module: str, devices: Sequence[str]) -> tuple[str, ...]:
    """What to execute for `python -m module` on these devices: that itself for one, the launcher for several.

    Args:
        module: its process calls `die_with_parent` first and trains inside of `joined`.
        devices: of each process: `cpu`, or how CUDA_VISIBLE_DEVICES names a GPU, or several.
    """
    if len(devices) == 1:
        return (sys.executable, "-m", module)
    return (sys.executable, "-m", __name__, module, *devices)


def sight(devices: str) -> dict[str, str]:
    """The environment of a process that has these devices and sees no other."""
    return {"CUDA_VISIBLE_DEVICES": "" if devices == "cpu" else devices}


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; of a rank, also if that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(1)


def rank() -> int:
    """Number of this process among its gang's, from 0; 0 where there is no gang."""
    return int(os.environ["RANK"]) if MEETING in os.environ else 0


@contextmanager
def joined() -> Iterator[Any]:
    """Be a member of torch.distributed's default group; its store (keys to bytes), None where there is no gang.

    Gloo moves tensors of the CPU, nccl those of GPUs.
    """
    if MEETING not in os.environ:
        yield None
        return
    dist = import_module("torch.distributed")
    world = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ[MEETING], world)
    backend = "nccl" if os.environ.get("CUDA_VISIBLE_DEVICES") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world, timeout=PATIENCE)
    try:
        yield store
    finally:
        dist.destroy_process_group()


def converse(session: str, words: Words) -> None:
    """Talk over the standard streams: rank 0 does, and the others tell nothing but what stops them.

    A crash or an out-of-memory kill ends this process and not the service. It ends with the service too: the kernel
    kills it when its parent dies, and so does the end of its standard input, which holds where the former does not (a
    parent that dies before this process has asked the kernel).

    Args:
        session: module whose `run` takes the first thing said, a queue of all that follow, and what sends an answer.
            It is imported late: torch takes seconds, and the lifeline must hold by then.
        words: what is said.
    """
    die_with_parent()
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    first = b""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        if rank() == 0:
            first = sys.stdin.buffer.readline()
            if not first:
                sys.exit(1)
            threading.Thread(target=_listen, args=(sys.stdin.buffer, words, commands), daemon=True).start()
        run = import_module(session).run
        with joined() as store:
            if store is not None and rank() == 0:
                store.set(START, first)
            start = words.from_line(first if store is None else store.get(START))
            run(start, commands, lambda message: answers.write(words.to_line(message)))


def _listen(stream: BinaryIO, words: Words, commands: queue.SimpleQueue[Any]) -> None:
    for line in stream:
        commands.put(words.from_line(line))
    os._exit(1)  # the service is gone, or wants us gone


def main(module: str, devices: Sequence[str]) -> None:
    """Run a gang to its end; the exit status, or the deadly signal, is that of the first rank that ended badly."""
    die_with_parent()
    elastic = import_module("torch.distributed.elastic.multiprocessing")
    with tempfile.TemporaryDirectory(prefix="lensmesh-gang-") as folder:
        environments = _environments(devices, Path(folder) / "meeting")
        ranks = elastic.start_processes(
            name=module,
            entrypoint=sys.executable,
            args=dict.fromkeys(environments, ("-m", module)),
            envs=environments,
            logs_specs=elastic.DefaultLogsSpecs(log_dir=folder),
        )
        try:
            result = ranks.wait(period=POLL_SECONDS)
        finally:
            ranks.close(timeout=DRAIN_SECONDS)
    if result.is_failed():
        _end_like([failure.exitcode for failure in result.failures.values()])


def _environments(devices: Sequence[str], meeting: Path) -> dict[int, Mapping[str, str]]:
    found: dict[int, Mapping[str, str]] = {}
    for number, device in enumerate(devices):
        found[number] = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(len(devices)),
            "LOCAL_WORLD_SIZE": str(len(devices)),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            **sight(device),
            MEETING: str(meeting),
            LAUNCHER: str(os.getpid()),
        }
    return found


def _end_like(statuses: Sequence[int]) -> None:
    """As the rank that a signal ended, else as the one that failed; SIGTERM is what elastic ends the others with."""
    first = min(statuses, key=lambda status: (status == -signal.SIGTERM, status))
    if first < 0:
        with suppress(OSError):  # SIGKILL has no handler to be put back
            signal.signal(-first, signal.SIG_DFL)
        os.kill(os.getpid(), -first)
    sys.exit(first)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
