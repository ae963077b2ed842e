"""Training processes, one or a gang of them: started, talked to, and gone when their block ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from services.kit import errors
from services.residency import gang
from services.training import dialogue
from services.training.dialogue import Finished, Gone, Message, Save, Saved, Start, Write, Written

LINE_BYTES = 16 * 1024 * 1024
MODULE = "services.training.child"
HOME = Path(__file__).parents[3]


class ChildProcess:
    """Implements the port `Child`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._unread: deque[Message] = deque()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def next(self) -> Message:
        """What was left unread, else the next line."""
        return self._unread.popleft() if self._unread else await self._read()

    async def save(self, folder: Path) -> Saved | None:
        """What is told meanwhile is kept for `next`."""
        await self._say(Save(str(folder)))
        while True:
            message = await self._read()
            if isinstance(message, Saved):
                return message
            self._unread.append(message)
            if isinstance(message, Finished):
                return None

    async def write(self, folders: Mapping[str, Path], infos: Mapping[str, Mapping[str, Any]]) -> Written:
        """Its last answer."""
        await self._say(Write({name: str(folder) for name, folder in folders.items()}, infos))
        message = await self._read()
        assert isinstance(message, Written), "a process answers what it is asked"
        return message

    async def _say(self, command: Start | Save | Write) -> None:
        assert self._process.stdin is not None, "started with pipes"
        self._process.stdin.write(dialogue.to_line(command))
        with suppress(ConnectionError):  # it is gone; reading tells why
            await self._process.stdin.drain()

    async def _read(self) -> Message:
        assert self._process.stdout is not None, "started with pipes"
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise _died(await self._process.wait())
        message = dialogue.from_line(line)
        if isinstance(message, Gone):
            kind = errors.Exhausted if message.reason == "DEVICE_OOM" else errors.Failed
            raise kind(message.message, reason=message.reason, metadata=message.facts)
        return message


class Processes:
    """Implements the port `Children`."""

    @asynccontextmanager
    async def start(self, start: Start) -> AsyncIterator[ChildProcess]:
        """The process gets nothing of ours but its standard streams and our environment.

        Its threads sleep while they wait for each other: on cores that others use, too, spinning ones keep away those
        that they wait for, and a step takes half as long again.
        """
        process = await asyncio.create_subprocess_exec(
            *gang.program(MODULE, start.ranks),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            cwd=HOME,
            env={
                "OMP_WAIT_POLICY": "PASSIVE",
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": str(start.threads),
            },
        )
        try:
            child = ChildProcess(process)
            await child._say(start)
            yield child
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            assert process.stdout is not None, "started with pipes"
            await process.stdout.read()  # ends when the last rank is gone
            await process.wait()


def _died(status: int) -> errors.Failed:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    return errors.Failed(f"the training process {how}", reason="TRAINING_FAILED", transient=True)
