"""Evaluation of a model that no device holds alone: by a process that has all the devices, and the model over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.training.dialogue import Found, Judge, Passed
from services.training.domain import WantedEvaluation
from services.training.job_ports import Batch, Children, Judging, LaidOutModel, Ledger, Splits
from services.training.judgements import Subject, write_batches

BATCHES = "batches.safetensors"


@dataclass(frozen=True, slots=True)
class Splitting:
    """What such evaluations use."""

    splits: Splits
    ledger: Ledger
    children: Children
    threads: int
    """CPU threads of a process."""

    @asynccontextmanager
    async def open(
        self, run: Judging, wanted: WantedEvaluation, model_id: str, facts: dict[str, Any]
    ) -> AsyncIterator[OverDevices]:
        """A model that is laid out; its weights are read where it is used."""
        model = await run.unless_stopped(self.splits.laid_out(model_id))
        try:
            yield OverDevices(self, run, wanted, model, facts)
        finally:
            await self.ledger.release(run.job_id)


@dataclass(frozen=True, slots=True)
class OverDevices:
    """With a model over several devices."""

    means: Splitting
    run: Judging
    wanted: WantedEvaluation
    model: LaidOutModel
    facts: dict[str, Any]
    """Of feature samples."""

    @property
    def modes(self) -> tuple[str, ...]:
        """To try, in order; none of them is the host's memory, where there is nothing to split."""
        return ("full", "safe") if self.wanted.mode == "auto" else (self.wanted.mode,)

    async def judge(self, mode: str, subject: Subject, batches: list[Batch], samples: Path | None) -> dict[str, Any]:
        """The figures; feature samples go into the folder. The process reads no dataset, and ends with the block."""
        run, means = self.run, self.means
        with run.staging() as folder:
            await asyncio.to_thread(write_batches, folder / BATCHES, batches)
            spread, bytes_each = await asyncio.to_thread(self.model.over, self.wanted.devices, subject.nbytes)
            reserving = means.ledger.reserve(run.job_id, bytes_each, self.wanted.devices, waiting=run.waiting, uses=())
            devices = await run.unless_stopped(reserving)
            start = Judge(
                model=asdict(spread),
                subject=asdict(subject),
                batches=str(folder / BATCHES),
                prefix=self.wanted.prefix,
                samples="" if samples is None else str(samples),
                samples_per_feature=self.wanted.samples_per_feature,
                facts=self.facts,
                ranks=[",".join(dict.fromkeys(devices))],
                threads=means.threads,
            )
            async with means.children.start(start) as child:
                while True:
                    said = await run.unless_stopped(child.next())
                    if isinstance(said, Found):
                        return dict(said.figures)
                    assert isinstance(said, Passed), "it tells its passes, and what it found"
                    done = {"batches": len(batches), "passes_done": said.done}
                    await run.progress(50 * said.done / len(batches), done)
