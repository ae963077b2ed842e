"""The steps of one training, wherever they are made: on the leased base itself, or in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.extensions import errors as translated
from services.extensions.compute import checkpoint
from services.extensions.compute.examples import Examples
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.train import StepReport, Trainer
from services.extensions.ports import Base


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a training is; see `Trainer`."""

    steps_done: int
    tokens_seen: int
    done: bool
    to_be_judged: bool
    best_step: int
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, trainer: Trainer) -> Standing:
        """Of a trainer, between two steps."""
        return cls(
            trainer.steps_done,
            trainer.tokens_seen,
            trainer.done,
            trainer.to_be_judged,
            trainer.best_step,
            trainer.ranks,
        )


class Course(Protocol):
    """A training between two steps."""

    @property
    def standing(self) -> Standing:
        """How far it is."""

    async def step(self) -> StepReport:
        """Make one step."""

    async def judged(self, held_out: float) -> None:
        """Note the held-out loss of the weights as they are."""

    async def settle(self) -> None:
        """Take the best weights, when early stopping kept any."""

    async def show(self) -> None:
        """Bring the weights as they are to the leased base, under the training's key."""

    async def state(self) -> Callable[[Path], None]:
        """Writes the state to resume from into an empty folder, on another thread, before anything else is asked."""


class Teams(Protocol):
    """Starts processes that train together."""

    def start(
        self,
        base: Base,
        key: str,
        folder: Path,
        work: tuple[Examples, TrainSettings],
        *,
        ranks: Sequence[str],
        state: Path | None,
    ) -> AbstractAsyncContextManager[Course]:
        """One process per rank, for as long as the block runs.

        Args:
            base: what they load copies of.
            key: under which the extension is attached to it.
            folder: the extension's files.
            work: what to train on, and how.
            ranks: devices, as `Ledger.reserve` returned them.
            state: what `Course.state` wrote, to go on from.

        Raises:
            errors.Failed: `TRAINING_FAILED` (transient): a process died; at any later call too.
            errors.Exhausted: `DEVICE_OOM`.
        """


class Here:
    """Implements `Course` on the base's own device thread, where each step leaves its weights."""

    def __init__(self, base: Base, trainer: Trainer) -> None:
        self._base, self._trainer = base, trainer

    @property
    def standing(self) -> Standing:
        """The trainer's."""
        return Standing.of(self._trainer)

    async def step(self) -> StepReport:
        """Others get their turn after it."""
        return await self._base.run(_stepped, self._trainer)

    async def judged(self, held_out: float) -> None:
        """At once."""
        await self._base.run(self._trainer.judged, held_out)

    async def settle(self) -> None:
        """At once."""
        await self._base.run(self._trainer.settle)

    async def show(self) -> None:
        """They are there."""

    async def state(self) -> Callable[[Path], None]:
        """Copied now."""
        return await self._base.run(checkpoint.files, self._trainer)


def _stepped(trainer: Trainer) -> StepReport:
    with translated.stored():
        return trainer.step()
