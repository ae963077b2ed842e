"""Processes of our own, one or a gang of them: started, talked to in lines, and gone when their block ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from services.kit import errors
from services.residency import gang
from services.residency.lines import Gone, Words
from services.residency.memory import oom_kills

LINE_BYTES: Final = 16 * 1024 * 1024
HOME: Final = Path(__file__).parents[2]
_KINDS: Final[dict[str, type[errors.LensmeshError]]] = {
    "DEVICE_OOM": errors.Exhausted,
    "LENS_INCOMPATIBLE": errors.Conflict,
}


class Spoken:
    """The service's end of the conversation; its process does `gang.converse`."""

    words: ClassVar[Words]

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._oom_kills = oom_kills()

    @property
    def pid(self) -> int:
        """Its process id; a gang's launcher's."""
        return self._process.pid

    async def say(self, command: Any) -> None:
        """One line to it."""
        assert self._process.stdin is not None, "started with pipes"
        self._process.stdin.write(self.words.to_line(command))
        with suppress(ConnectionError):  # it is gone; reading tells why
            await self._process.stdin.drain()

    async def hear(self) -> Any:
        """The next line from it.

        Raises:
            errors.LensmeshError: it said why it cannot go on; `TRAINING_FAILED` (transient): it died; `DEVICE_OOM`: the
                kernel ended it because the machine ran out of memory.
        """
        assert self._process.stdout is not None, "started with pipes"
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            status = await self._process.wait()
            raise _died(status, of_memory=oom_kills() > self._oom_kills)
        message = self.words.from_line(line)
        if isinstance(message, Gone):
            kind = _KINDS.get(message.reason, errors.Failed)
            raise kind(message.message, reason=message.reason, metadata=message.facts)
        return message


S = TypeVar("S", bound=Spoken)


@asynccontextmanager
async def started(kind: type[S], module: str, devices: Sequence[str], threads: int) -> AsyncIterator[S]:
    """`python -m module` on these devices, with so many CPU threads each.

    It gets nothing of ours but its standard streams and our environment.
    """
    process = await asyncio.create_subprocess_exec(
        *gang.program(module, devices),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        cwd=HOME,
        # Threads that spin while they wait for each other keep away those that they wait for where cores are shared.
        env={
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            **(gang.sight(devices[0]) if len(devices) == 1 else {}),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(threads),
        },
    )
    try:
        yield kind(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        assert process.stdout is not None, "started with pipes"
        await process.stdout.read()  # ends when the last rank is gone
        await process.wait()


def _died(status: int, *, of_memory: bool) -> errors.LensmeshError:
    if status == -signal.SIGKILL and of_memory:
        return errors.Exhausted("the machine ran out of memory", reason="DEVICE_OOM", transient=True)
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    return errors.Failed(f"the training process {how}", reason="TRAINING_FAILED", transient=True)
