"""What several files of wire tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Training processes that were told something; the first stands still from its first checkpoint until told more.

    Of a gang, whose launcher has the id, the last rank stands still, and the others wait for it.
    """
    from services.training.adapters.processes import ChildProcess

    told: list[int] = []
    say, save = ChildProcess.say, ChildProcess.save

    def held(pid: int) -> psutil.Process:
        return max(psutil.Process(pid).children(), key=lambda rank: rank.environ()["RANK"], default=psutil.Process(pid))

    async def remember(self: ChildProcess, command: Any) -> None:
        if len(set(told)) == 1:
            held(self.pid).send_signal(signal.SIGCONT)
        told.append(self.pid)
        await say(self, command)

    async def hold(self: ChildProcess, folder: Path) -> Any:
        first = told.count(self.pid) == 1 and set(told) == {self.pid}
        saved = await save(self, folder)
        if first:
            os.kill(held(self.pid).pid, signal.SIGSTOP)
        return saved

    monkeypatch.setattr(ChildProcess, "say", remember)
    monkeypatch.setattr(ChildProcess, "save", hold)
    return told
