"""The extraction itself: what a worker does with a claimed job, from the dataset to the published cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.extraction import preparing
from services.extraction.compute import (
    Buffers,
    Moments,
    Pace,
    Plan,
    Unit,
    UnitFiller,
    hook_point_entries,
    sequence_tensors,
    statistics_tensors,
)
from services.extraction.domain import BaseModel, Mode, Task
from services.extraction.job_ports import Filler, Help, LeasedModel, Models, Product, Run
from services.extraction.ports import Caches, Catalogue, Datasets, Tokenized
from services.extraction.requests import row_bytes
from services.kit import errors
from services.kit.waiting import cancel_all, wait_for
from services.residency.shards import DTYPES, FileEntry, Manifest, ShardEntry
from services.residency.tokens import tokenizer_digest

POLL_SECONDS = 0.5
EVENT_STEP = 5.0
"""Percent of progress between two events."""
ROW_SECONDS = 1.0
"""Least time between two writes of the progress to the job's row."""
SOURCE_BYTES = 12
"""Bytes of a token's id and its place in the dataset."""
TABLE_BYTES = 24
"""Bytes beside the activations of one token: ids, places, masks."""


@dataclass(frozen=True, slots=True)
class _Work:
    """An extraction with everything that it reads at hand."""

    task: Task
    key: str
    record: BaseModel
    model: LeasedModel
    tokenized: Tokenized
    plan: Plan
    mode: Mode

    @property
    def samples(self) -> int:
        """Sequences that go through the model."""
        return sum(len(unit.sequences) for unit in self.plan.units)

    @property
    def shape(self) -> tuple[int, ...]:
        """[tokens, width] or [samples, sequence, width] of the first hook point's kind of tensor."""
        width = self.model.facts.hidden_size
        if self.plan.layout == "rows":
            return (self.plan.tokens, width)
        return (self.samples, self.plan.max_length, width)

    @property
    def size_bytes(self) -> int:
        """Bytes that the cache will have."""
        stored = self.plan.tokens if self.plan.layout == "rows" else self.samples * self.plan.max_length
        per_token = row_bytes(self.task.options, self.model.facts, self.plan.max_length)
        return stored * (per_token + TABLE_BYTES) + len(self.tokenized.sequences.ids) * SOURCE_BYTES


class ExtractionJob:
    """Runs claimed extractions."""

    def __init__(self, catalogue: Catalogue, models: Models, datasets: Datasets, caches: Caches) -> None:
        self._catalogue = catalogue
        self._models = models
        self._datasets = datasets
        self._caches = caches
        self._running = 0

    async def run(self, run: Run) -> dict[str, Any]:
        """Do what the claim says; returns the job's result.

        Raises:
            errors.Invalid: the dataset holds nothing usable, or a hook point does not exist.
            errors.Failed: `HOOK_IDENTITY_FAILED`, `CHECKSUM_MISMATCH`, or why the model cannot be loaded.
            errors.Exhausted: `CACHE_FULL`.
        """
        task = await run.begin()
        if task.cache_id is not None:  # published by an attempt that ended before the job's row said so
            return {"cache_id": task.cache_id}
        while (cache_id := await self._reused(run, task)) is None and (other := await run.ahead()):
            await run.waiting(f"extraction {other}")
            await run.unless_stopped(asyncio.sleep(POLL_SECONDS))
        if cache_id is not None:
            return {"cache_id": cache_id}
        await self._bring(run, task)
        self._running += 1
        try:
            async with self._models.lease(task.model_id, task.options.extension_uri) as model:
                return {"cache_id": await self._extract(run, await self._prepared(run, task, model))}
        finally:
            self._running -= 1

    @property
    def idle(self) -> bool:
        """Whether no extraction of this process's own runs."""
        return not self._running

    async def help(self, run: Help) -> None:
        """Make units of an extraction that another process has claimed.

        Raises:
            NotNeeded: there is nothing to help.
            errors.LensmeshError: as `run`.
        """
        task = await run.begin()
        await self._models.bring(task.model_id)
        async with self._models.lease(task.model_id, task.options.extension_uri) as model:
            work = await self._prepared(run, task, model)
            run.joins(work.plan)
            async with run.leasing():
                await _fill(run, work, None)

    async def _reused(self, run: Run, task: Task) -> str | None:
        """Complete with a cache that another extraction made meanwhile."""
        record, survey = await self._inputs(task)
        if not record.digest:
            return None
        found = await self._caches.find(task.options.key(record, survey), task.options.hook_points)
        if found is None:
            return None
        await run.reuse(found)
        return found.id

    async def _bring(self, run: Run, task: Task) -> None:
        """Have the model here, or do what the request says where it is on no device."""
        absent = task.options.if_unloaded
        while absent != "load" and not (await self._catalogue.model(task.model_id)).loaded:
            if absent == "fail":
                message = "the model is not loaded, and the request says to fail then"
                raise errors.Failed(message, reason="EXTRACTION_FAILED", metadata={"model_id": task.model_id})
            await run.waiting("its model to be loaded")
            await run.unless_stopped(asyncio.sleep(POLL_SECONDS))
        await run.waiting("the model")
        await run.unless_stopped(self._models.bring(task.model_id))
        await run.waiting(None)

    async def _inputs(self, task: Task) -> tuple[BaseModel, Any]:
        record = await self._catalogue.model(task.model_id)
        return record, await self._datasets.survey(task.dataset_id, record)

    async def _prepared(self, run: Filler, task: Task, model: LeasedModel) -> _Work:
        record, survey = await self._inputs(task)
        preparing.check_files(record, model)
        mode, model = await preparing.placed(task.options, model)
        tokenized = await run.unless_stopped(
            self._datasets.tokenize(task.dataset_id, task.options, model.tokenizer, model.facts.vocab_size)
        )
        arrays = await run.kept_plan() if task.plan_digest else None
        plan = await asyncio.to_thread(
            preparing.planned_once, task.options, tokenized, model, arrays=arrays, digest=task.plan_digest or ""
        )
        return _Work(task, task.options.key(record, survey), record, model, tokenized, plan, mode)

    async def _extract(self, run: Run, work: _Work) -> str:
        done = await run.resume(work.plan, work.samples, work.size_bytes)
        identity = await work.model.run(preparing.identity, work.task.options, work.tokenized, work.plan, work.model)
        meter = _Meter(run, work, done)
        while True:
            async with _collecting(run):
                await _fill(run, work, meter)
            await meter.catch_up(done := await run.done())
            if len(done) == len(work.plan.units):
                break
            await run.waiting("units that other processes make")
            await run.unless_stopped(asyncio.sleep(POLL_SECONDS))
        await run.waiting(None)
        moments = await run.moments(work.plan)
        product = Product(
            plan=work.plan,
            key=work.key,
            sequences=sequence_tensors(work.tokenized.sequences, work.plan),
            statistics=statistics_tensors(moments),
            describe=lambda shards, sequences, statistics: _manifest(
                work, moments, identity, shards=shards, sequences=sequences, statistics=statistics
            ),
            shape=work.shape,
            tokens_per_second=meter.tokens_per_second,
        )
        return await run.publish(product)


class _Meter:
    """Tells how far an extraction is: an event every 5 %, the row more often."""

    def __init__(self, run: Run, work: _Work, done: set[int]) -> None:
        self._run = run
        self._units = work.plan.units
        self._mode = work.mode
        self._total = work.samples
        self._samples = self._tokens = 0
        self._counted: set[int] = set()
        self._count(done)
        self._tokens_before = self._tokens
        self._told = self._percent // EVENT_STEP
        self._halved = 0
        self._started = self._written = time.monotonic()

    def begin(self, unit: Unit) -> None:
        """Its batches will be counted one by one."""
        self._counted.add(unit.index)

    async def catch_up(self, done: set[int]) -> None:
        """Count the units that others made."""
        self._count(done)
        await self.add(0, 0, Pace())

    def _count(self, done: set[int]) -> None:
        for index in done - self._counted:
            self._samples += len(self._units[index].sequences)
            self._tokens += self._units[index].rows
        self._counted |= done

    @property
    def _percent(self) -> float:
        return 100.0 * self._samples / self._total

    @property
    def tokens_per_second(self) -> float | None:
        """Of this attempt, None where everything was done before."""
        tokens = self._tokens - self._tokens_before
        return tokens / (time.monotonic() - self._started) if tokens else None

    async def add(self, samples: int, tokens: int, pace: Pace) -> None:
        """Count a batch; that memory ran out in it is told at once."""
        self._samples += samples
        self._tokens += tokens
        tell = self._percent // EVENT_STEP > self._told or pace.halved > self._halved
        self._halved = max(self._halved, pace.halved)
        now = time.monotonic()
        if not tell and now - self._written < ROW_SECONDS:
            return
        self._told, self._written = self._percent // EVENT_STEP, now
        figures: dict[str, Any] = {
            "samples_processed": self._samples,
            "total_samples": self._total,
            "tokens": self._tokens,
            "tokens_per_second": round(self.tokens_per_second or 0.0, 1),
        }
        if pace.latest:
            figures |= {"mode": self._mode, "batch_size": pace.latest, "out_of_memory": pace.halved}
        await self._run.progress(self._percent, figures, tell=tell)


@asynccontextmanager
async def _collecting(run: Run) -> AsyncIterator[None]:
    """What other hosts have made comes here while this process computes; what fails of it is tried again behind."""
    enough = asyncio.Event()

    async def collect() -> None:
        while not await wait_for(enough, POLL_SECONDS):
            await run.done()

    task = asyncio.create_task(collect())
    try:
        yield
        enough.set()
        await asyncio.gather(task, return_exceptions=True)
    finally:
        await cancel_all([task])


async def _fill(run: Filler, work: _Work, meter: _Meter | None) -> None:
    """Make units until none is left to lease; one is written while the next one is computed."""
    options, model = work.task.options, work.model
    pace, memory = preparing.pace(work.mode, options, model), Buffers()

    async def save(filler: UnitFiller, moments: Mapping[str, Moments]) -> None:
        await run.save_unit(filler.unit, filler.tensors, moments)
        filler.release()

    writing: asyncio.Task[None] | None = None
    try:
        while (index := await run.lease_unit()) is not None:
            unit = work.plan.units[index]
            if meter is not None:
                meter.begin(unit)
            sequences, dtype = work.tokenized.sequences, DTYPES[options.dtype]
            filler = await asyncio.to_thread(
                UnitFiller, sequences, work.plan, unit, options.hook_points, dtype, pace=pace, memory=memory
            )
            for batch in unit.batches:
                await run.checkpoint()
                rows = await model.run(filler.run, model.model, model.family, batch)
                if meter is not None:
                    await meter.add(len(batch.indices), rows, pace)
            moments = await model.run(filler.moments)
            if writing is not None:
                await writing
            writing = asyncio.create_task(save(filler, moments))
        if writing is not None:
            await writing
    finally:
        if writing is not None:
            await asyncio.gather(writing, return_exceptions=True)


def _manifest(
    work: _Work,
    moments: Mapping[str, Moments],
    identity: Mapping[str, float],
    *,
    shards: tuple[ShardEntry, ...],
    sequences: FileEntry,
    statistics: FileEntry,
) -> Manifest:
    options, plan, tokenizer = work.task.options, work.plan, work.model.tokenizer
    return Manifest(
        hook_points=hook_point_entries({name: moments[name] for name in options.hook_points}),
        layout=plan.layout,
        dtype=options.dtype,
        shuffled=plan.layout == "rows" and plan.shuffled,
        tokens=plan.tokens,
        samples=work.samples,
        max_length=plan.max_length,
        uncounted_ids=plan.uncounted_ids,
        shards=shards,
        sequences=sequences,
        statistics=statistics,
        model={**work.model.description, "revision": work.record.revision},
        dataset={**work.tokenized.description, "max_length": options.max_length},
        plan={
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "batch_tokens": plan.batch_tokens,
            "units": len(plan.units),
            "digest": plan.digest,
        },
        extension={"id": options.extension_id, "uri": options.extension_uri} if options.extension_id else None,
        tokenizer={"digest": tokenizer_digest(tokenizer)} if tokenizer is not None else None,
        identity_errors=dict(identity),
    )
