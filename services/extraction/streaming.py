"""A live stream of activations: units are computed one ahead of their reader and handed out as blocks of rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from safetensors.torch import save
from torch import Tensor

from services.extraction import preparing
from services.extraction.compute import Buffers, Plan, Unit, UnitFiller
from services.extraction.domain import Mode, Options, WantedStream
from services.extraction.job_ports import LeasedModel, Models
from services.extraction.ports import Catalogue, Datasets, Place, Places, Tokenized
from services.extraction.requests import row_bytes, widths
from services.kit import errors
from services.kit.files import CHUNK_BYTES
from services.residency.shards import DTYPES
from services.residency.shuffle import draw

T = TypeVar("T")
BUFFER_BYTES = 256 * 2**20
BLOCK_BYTES = 16 * 2**20
TABLE_BYTES = 12
"""Bytes of one row's token id, sequence and position."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the blocks of a stream hold."""

    hook_points: tuple[str, ...]
    widths: tuple[int, ...]
    dtype: str
    rows_per_pass: int
    by_handle: bool
    model_digest: str
    identity_error: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """A block as a file in the reader's place, or a chunk of it."""

    first_row: int
    rows: int
    size_bytes: int
    handle: str = ""
    offset: int = 0
    chunk: bytes = b""


@dataclass(frozen=True, slots=True)
class _Block:
    first_row: int
    tensors: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        return len(self.tensors["tok"])


class Streams:
    """Opens streams; each holds its model and its buffer until its reader leaves."""

    def __init__(
        self,
        catalogue: Catalogue,
        models: Models,
        datasets: Datasets,
        places: Places,
        *,
        device: str,
        most_streams: int,
    ) -> None:
        self._device = device
        self._catalogue = catalogue
        self._models = models
        self._datasets = datasets
        self._places = places
        self._most_streams = most_streams
        self._open = 0

    @asynccontextmanager
    async def open(self, asked: WantedStream) -> AsyncIterator[Stream]:
        """A stream for the length of the block; its model is brought here first.

        Raises:
            errors.Invalid: a field is wrong, or the dataset holds nothing usable.
            errors.NotFound: there is no such model or dataset.
            errors.Exhausted: `QUEUE_FULL`: as many streams as may be are open.
            errors.Failed: `HOOK_IDENTITY_FAILED`, `CHECKSUM_MISMATCH`, or why the model cannot be loaded.
        """
        with _inside("extraction"):
            if asked.wanted.layout == "sequences":
                raise errors.Invalid.of("layout", "a stream has rows")
            wanted = replace(asked.wanted, layout="rows")
            record, _, options = await preparing.look_up(self._catalogue, self._datasets, wanted, self._device)
        if self._open >= self._most_streams:
            raise errors.Exhausted(f"{self._open} streams are open", reason="QUEUE_FULL", retry_after=5.0)
        self._open += 1
        try:
            await self._models.bring(record.id)
            async with self._models.lease(record.id, options.extension_uri) as leased:
                preparing.check_files(record, leased)
                mode, model = await preparing.placed(options, leased)
                tokenized = await self._datasets.tokenize(
                    wanted.dataset_id, options, model.tokenizer, model.facts.vocab_size
                )
                place = self._places.find(asked.place) if asked.place else None
                rows = _Rows(model, options, tokenized, mode=mode, unit_bytes=(asked.buffer_bytes or BUFFER_BYTES) // 2)
                yield Stream(asked, rows, await rows.facts(record.digest, place is not None), place)
        finally:
            self._open -= 1


class Stream:
    """One open stream."""

    def __init__(self, asked: WantedStream, rows: _Rows, facts: Facts, place: Place | None) -> None:
        self.facts = facts
        self._asked = asked
        self._rows = rows
        self._place = place

    async def parts(self) -> AsyncGenerator[Part]:
        """Blocks in their order, from the one that holds the row behind the cursor."""
        async with aclosing(self._rows.blocks(self._asked.cursor, self._asked.rows)) as blocks:
            parts = _chunks(blocks, self._asked.offset) if self._place is None else _files(blocks, self._place)
            async with aclosing(parts):
                async for part in parts:
                    yield part


class _Rows:
    """All rows of a dataset, pass after pass, in the order that the options fix."""

    def __init__(
        self, model: LeasedModel, options: Options, tokenized: Tokenized, *, mode: Mode, unit_bytes: int
    ) -> None:
        self._model = model
        self._pace = preparing.pace(mode, options, model)
        self._options = options
        self._tokenized = tokenized
        self._unit_bytes = unit_bytes
        self._longest = int(tokenized.sequences.lengths.max())
        self._row_bytes = row_bytes(options, model.facts, self._longest)
        self._memory = Buffers()
        self._first: Plan | None = None

    async def facts(self, model_digest: str, by_handle: bool) -> Facts:
        """Also checks that MLP pairs are pairs."""
        plan = await self._plan(0)
        found = await self._model.run(preparing.identity, self._options, self._tokenized, plan, self._model)
        return Facts(
            hook_points=self._options.hook_points,
            widths=tuple(widths(self._options.hook_points, self._model.facts, self._longest)),
            dtype=self._options.dtype,
            rows_per_pass=plan.tokens,
            by_handle=by_handle,
            model_digest=model_digest,
            identity_error=max(found.values(), default=None),
        )

    async def blocks(self, cursor: int, end: int) -> AsyncGenerator[_Block]:
        """From the block that holds row `cursor` up to the one that holds the last row before `end`; 0 is never.

        Whoever asks for the next block has read the last one: its memory is used again.
        """
        size = max(1, min(BLOCK_BYTES, self._unit_bytes) // (self._row_bytes + TABLE_BYTES))
        async with aclosing(one_ahead(self._units(cursor, end))) as units:
            async for first, unit in units:
                tensors = unit.tensors
                skipped = max(0, cursor - first) // size * size
                until = min(len(tensors["tok"]), end - first) if end else len(tensors["tok"])
                for low in range(skipped, until, size):
                    yield _Block(first + low, {name: tensor[low : low + size] for name, tensor in tensors.items()})
                unit.release()

    async def _units(self, cursor: int, end: int) -> AsyncGenerator[tuple[int, UnitFiller]]:
        """First row and filled unit, for all that hold rows from `cursor` to `end`."""
        rows_per_pass = (await self._plan(0)).tokens
        number = cursor // rows_per_pass
        first = number * rows_per_pass
        while True:
            plan = await self._plan(number)
            for unit in plan.units:
                if end and first >= end:
                    return
                if first + unit.rows > cursor:
                    yield first, await self._filled(plan, unit)
                first += unit.rows
            number += 1

    async def _filled(self, plan: Plan, unit: Unit) -> UnitFiller:
        options, model = self._options, self._model
        sequences, dtype = self._tokenized.sequences, DTYPES[options.dtype]
        filler = await asyncio.to_thread(
            UnitFiller, sequences, plan, unit, options.hook_points, dtype, pace=self._pace, memory=self._memory
        )
        for batch in unit.batches:
            await model.run(filler.run, model.model, model.family, batch)
        return filler

    async def _plan(self, number: int) -> Plan:
        """Of one pass; the first is asked for more than once."""
        if number == 0 and self._first is not None:
            return self._first
        plan = await asyncio.to_thread(
            preparing.planned,
            self._options,
            self._tokenized,
            self._model,
            seed=draw(2**62, self._options.seed, "pass", number),
            batch_size=max(1, min(self._options.batch_size, self._unit_bytes // self._row_bytes // self._longest)),
            unit_bytes=self._unit_bytes,
            unit_share=1.0,
            most_unit_bytes=self._unit_bytes,
        )
        if number == 0:
            self._first = plan
        return plan


async def one_ahead(items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same items; the next one is made while one is used."""

    async def following() -> tuple[T] | None:
        try:
            return (await anext(items),)
        except StopAsyncIteration:
            return None

    task = asyncio.create_task(following())
    try:
        while (found := await task) is not None:
            task = asyncio.create_task(following())
            yield found[0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await items.aclose()


async def _files(blocks: AsyncIterator[_Block], place: Place) -> AsyncGenerator[Part]:
    async for block in blocks:
        handle, size = await place.put(block.tensors)
        yield Part(block.first_row, block.rows, size, handle)


async def _chunks(blocks: AsyncIterator[_Block], offset: int) -> AsyncGenerator[Part]:
    """`offset` bytes of the first block are left out."""
    async with aclosing(one_ahead(_packed(blocks))) as packed:
        async for block, data in packed:
            view = memoryview(data)
            for low in range(offset, len(data), CHUNK_BYTES):
                chunk = bytes(view[low : low + CHUNK_BYTES])
                yield Part(block.first_row, block.rows, len(data), offset=low, chunk=chunk)
            offset = 0


async def _packed(blocks: AsyncIterator[_Block]) -> AsyncGenerator[tuple[_Block, bytes]]:
    async for block in blocks:
        yield block, await asyncio.to_thread(save, dict(block.tensors))


@contextmanager
def _inside(field: str) -> Iterator[None]:
    """Wrong fields are named as those of the message `field`."""
    try:
        yield
    except errors.Invalid as error:
        raise errors.Invalid(
            error.message,
            reason=error.reason,
            metadata=error.metadata,
            violations=[(f"{field}.{name}", text) for name, text in error.violations],
        ) from error
