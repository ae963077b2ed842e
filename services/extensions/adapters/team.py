"""Processes that train an extension together, each with a base of its own; they end with the block that uses them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import ClassVar

import torch

from services.extensions import errors as translated
from services.extensions.compute.examples import Examples
from services.extensions.compute.settings import TrainSettings, figures_of
from services.extensions.compute.train import StepReport
from services.extensions.course import Standing
from services.extensions.dialogue import WORDS, Do, Done, Start
from services.extensions.ports import Base
from services.residency.lenses.extension_files import attachable
from services.residency.lines import Words
from services.residency.spoken import Spoken, started

MODULE = "services.extensions.child"


class TeamProcess(Spoken):
    """The processes, spoken to through the first of them."""

    words: ClassVar[Words] = WORDS

    async def do(self, command: Start | Do) -> Done:
        """Say it and wait until it is done; whoever stops waiting cannot ask again."""
        await self.say(command)
        done: Done = await self.hear()
        return done


class Together:
    """Implements `Course` on a team; the leased base gets the weights when they are shown."""

    def __init__(self, team: TeamProcess, base: Base, key: str, shared: str, ready: Done) -> None:
        self._team, self._base, self._key, self._shared = team, base, key, shared
        self._standing = ready.standing

    @property
    def standing(self) -> Standing:
        """As of the last answer."""
        return Standing(**self._standing)

    async def step(self) -> StepReport:
        """In all processes."""
        report = (await self._do(Do("step"))).report
        assert report is not None, "a step is reported"
        return StepReport(**report)

    async def judged(self, held_out: float) -> None:
        """In all processes."""
        await self._do(Do("judged", held_out=held_out))

    async def settle(self) -> None:
        """In all processes."""
        await self._do(Do("settle"))

    async def show(self) -> None:
        """Through files, as a later use of the extension reads them."""
        with TemporaryDirectory(dir=self._shared) as folder:
            await self._do(Do("weights", folder=folder))
            await self._base.run(_replaced, self._base, self._key, Path(folder))

    async def state(self) -> Callable[[Path], None]:
        """Written by the first process now, moved later."""
        written = Path(mkdtemp(dir=self._shared))
        await self._do(Do("state", folder=str(written)))

        def move(folder: Path) -> None:
            for file in written.iterdir():
                shutil.move(file, folder)

        return move

    async def _do(self, command: Do) -> Done:
        done = await self._team.do(command)
        self._standing = done.standing
        return done


class TeamProcesses:
    """Implements the port `Teams`."""

    @asynccontextmanager
    async def start(
        self,
        base: Base,
        key: str,
        folder: Path,
        work: tuple[Examples, TrainSettings],
        *,
        ranks: Sequence[str],
        state: Path | None,
    ) -> AsyncIterator[Together]:
        """Ready to make a step."""
        examples, settings = work
        threads = max(1, torch.get_num_threads() // len(ranks))
        with TemporaryDirectory(prefix="lensmesh-team-") as shared:
            file = Path(shared) / "examples.safetensors"
            await asyncio.to_thread(examples.save, file)
            start = Start(
                _path(base.directory),
                base.quantization,
                _path(folder),
                str(file),
                figures_of(settings),
                ranks,
                state="" if state is None else _path(state),
            )
            async with started(TeamProcess, MODULE, ranks, threads) as team:
                yield Together(team, base, key, shared, await team.do(start))


def _path(path: Path) -> str:
    """Means the same in a process that was started elsewhere."""
    return str(path.absolute())


def _replaced(base: Base, key: str, folder: Path) -> None:
    with translated.stored():
        base.attached.replace(key, attachable(folder, base.model, base_digest=base.digest))
