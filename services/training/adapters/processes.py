"""Training processes, one or a gang of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from services.residency.lines import Words
from services.residency.spoken import Spoken, started
from services.training.dialogue import WORDS, Finished, Judge, Message, Save, Saved, Start, Write, Written

MODULE = "services.training.child"


class ChildProcess(Spoken):
    """Implements the port `Child`."""

    words: ClassVar[Words] = WORDS

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process)
        self._unread: deque[Message] = deque()

    async def next(self) -> Message:
        """What was left unread, else the next line."""
        return self._unread.popleft() if self._unread else await self.hear()

    async def save(self, folder: Path) -> Saved | None:
        """What is told meanwhile is kept for `next`; one that has told its end answers no more."""
        if any(isinstance(message, Finished) for message in self._unread):
            return None
        await self.say(Save(str(folder)))
        while True:
            message = await self.hear()
            if isinstance(message, Saved):
                return message
            self._unread.append(message)
            if isinstance(message, Finished):
                return None

    async def write(self, folders: Mapping[str, Path], infos: Mapping[str, Mapping[str, Any]]) -> Written:
        """Its last answer."""
        await self.say(Write({name: str(folder) for name, folder in folders.items()}, infos))
        message = await self.hear()
        assert isinstance(message, Written), "a process answers what it is asked"
        return message


class Processes:
    """Implements the port `Children`."""

    @asynccontextmanager
    async def start(self, start: Start | Judge) -> AsyncIterator[ChildProcess]:
        """Told what to train or to evaluate."""
        async with started(ChildProcess, MODULE, start.ranks, start.threads) as child:
            await child.say(start)
            yield child
