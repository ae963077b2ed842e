"""The decisions of the extraction service: one function per rpc."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from services.extraction import preparing
from services.extraction.domain import (
    Cache,
    Extraction,
    Filter,
    Match,
    NewExtraction,
    Planned,
    Wanted,
)
from services.extraction.ports import Caches, Catalogue, Datasets, Meters, Store, UnitFiles
from services.extraction.requests import estimate
from services.kit import errors
from services.kit.files import chunks
from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.residency.shards import MANIFEST, CorruptCache, FileEntry, Manifest, Problem, ShardReader, problem_of


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of a cache that is not what it was; `index` is its shard, -1 for the other files."""

    index: int
    file: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A part of a cache's file that is about to be sent."""

    total: int
    """Bytes of the whole file."""
    chunks: AsyncIterator[bytes]


class Operations:
    """What the servicer calls; raises `services.kit.errors` only."""

    def __init__(
        self,
        store: Store,
        caches: Caches,
        catalogue: Catalogue,
        datasets: Datasets,
        *,
        units: UnitFiles,
        device: str,
        meters: Meters,
    ) -> None:
        """Use these ports.

        Args:
            store: extractions.
            caches: activation caches.
            catalogue: the registry.
            datasets: registered text.
            units: what was made for other hosts.
            device: what the first estimate and the size of a forward pass assume.
            meters: counts hits and misses.
        """
        self._store = store
        self._caches = caches
        self._catalogue = catalogue
        self._datasets = datasets
        self._units = units
        self._device = device
        self._meters = meters
        self._intact: set[tuple[str, str, int, int]] = set()

    async def plan(self, wanted: Wanted) -> Planned:
        """What an extraction would take, and whether a cache answers it; nothing is changed.

        Raises:
            errors.Invalid: a field is wrong.
            errors.NotFound: there is no such model or dataset.
        """
        new, match, _ = await self._considered(wanted)
        fits = match != "miss" or new.estimate.size_bytes <= self._caches.limit_bytes
        return Planned(new.estimate, match, fits)

    async def extract(self, wanted: Wanted, key: RequestKey) -> Extraction:
        """Queue an extraction, or answer it from a cache.

        Raises:
            errors.Invalid: a field is wrong; nothing was started.
            errors.NotFound: there is no such model or dataset.
            errors.Exhausted: `QUEUE_FULL`.
        """
        new, match, cache = await self._considered(wanted)
        self._meters.asked(match)
        if cache is not None:
            return await self._store.reuse(new, cache.id, key)
        return await self._store.queue(new, key)

    async def _considered(self, wanted: Wanted) -> tuple[NewExtraction, Match, Cache | None]:
        model, survey, options = await preparing.look_up(self._catalogue, self._datasets, wanted, self._device)
        rates = await self._store.rates(wanted.model_id, wanted.dataset_id, options)
        expected = estimate(options, model, survey, rates=rates, device=self._device)
        key = options.key(model, survey)
        cache = await self._caches.find(key, options.hook_points) if model.digest else None
        new = NewExtraction(self._store.new_id(), wanted.model_id, wanted.dataset_id, options, key, expected)
        if cache is None:
            return new, "miss", None
        exact = set(cache.hook_points) == set(options.hook_points)
        return new, "hit" if exact else "subset", cache

    async def get(self, extraction_id: str, model_id: str = "") -> Extraction:
        """One extraction; of this model only where one is named.

        Raises:
            errors.NotFound: there is none.
        """
        found = await self._store.get(extraction_id)
        if model_id and found.model_id != model_id:
            raise errors.NotFound(f"{model_id} has no extraction {extraction_id}", metadata={"id": extraction_id})
        return found

    async def list(self, wanted: Filter) -> Page:
        """Extractions, newest first."""
        return await self._store.list(wanted)

    async def cancel(self, extraction_id: str) -> Extraction:
        """Stop an extraction within one batch.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has completed or failed already.
        """
        await self._store.get(extraction_id)
        await self._store.cancel(extraction_id)
        return await self._store.get(extraction_id)

    async def pause(self, extraction_id: str) -> Extraction:
        """Stop an extraction within one batch; the units that are done stay.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has ended, or its cache is being made.
        """
        await self._store.get(extraction_id)
        await self._store.pause(extraction_id)
        return await self._store.get(extraction_id)

    async def resume(self, extraction_id: str) -> Extraction:
        """Let a paused extraction go on behind its last unit.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it is not paused.
        """
        await self._store.get(extraction_id)
        await self._store.resume(extraction_id)
        return await self._store.get(extraction_id)

    async def delete(self, extraction_id: str) -> None:
        """Forget an extraction that has ended; its cache stays.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has not ended.
        """
        await self._store.delete(extraction_id)

    async def cache(self, cache_id: str) -> Cache:
        """One cache.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._caches.get(cache_id)

    async def caches(self, wanted: Filter) -> Page:
        """Caches, newest first."""
        return await self._caches.list(wanted)

    async def delete_cache(self, cache_id: str) -> None:
        """Delete a cache and its files.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: `IN_USE`: somebody reads it.
        """
        await self._caches.delete(cache_id)

    async def open(self, cache_id: str) -> Cache:
        """A cache for a reader that maps its files; counts as a use.

        Raises:
            errors.NotFound: there is none.
        """
        cache = await self._caches.get(cache_id)
        await self._caches.touch(cache_id)
        return cache

    async def verify(self, cache_id: str) -> Sequence[Damage]:
        """Every file of a cache that is not what was written; all bytes are read.

        Raises:
            errors.NotFound: there is none, or its files are on another host.
            errors.Failed: `ARTIFACT_LOST`: all of its files are gone.
        """
        cache = await self._caches.get(cache_id)
        async with self._caches.reading(cache) as directory:
            return await asyncio.to_thread(_damage, directory, cache)

    @asynccontextmanager
    async def read_shard(self, cache_id: str, index: int, offset: int, length: int) -> AsyncIterator[FileBytes]:
        """Bytes of a shard in chunks of at most 1 MiB; to its end where `length` is 0.

        The whole shard is checked against its digest before its first byte leaves this process.

        Raises:
            errors.NotFound: there is no such cache or shard here.
            errors.Invalid: `offset` is behind the end.
            errors.Failed: `CHECKSUM_MISMATCH`.
        """
        cache = await self._caches.get(cache_id)
        shards = cache.manifest["shards"]
        if index >= len(shards):
            raise errors.NotFound(f"{cache_id} has {len(shards)} shards", metadata={"id": cache_id, "index": index})
        async with self.read_file(cache_id, shards[index]["name"], offset, length) as found:
            yield found

    @asynccontextmanager
    async def read_file(self, cache_id: str, name: str, offset: int, length: int) -> AsyncIterator[FileBytes]:
        """Bytes of a file of a cache, checked and cut as a shard's.

        Raises:
            errors.NotFound: there is no such cache, it has no such file, or it is on another host.
            errors.Invalid: `offset` is behind the end.
            errors.Failed: `CHECKSUM_MISMATCH`.
        """
        cache = await self._caches.get(cache_id)
        entry = _entries(cache).get(name)
        if entry is None:
            raise errors.NotFound(f"{cache_id} has no such file", metadata={"id": cache_id})
        if offset > entry.size_bytes:
            raise errors.Invalid.of("offset", f"the file has {entry.size_bytes} bytes", size_bytes=entry.size_bytes)
        async with self._caches.reading(cache) as directory:
            await self._require_intact(cache, directory, entry)
            end = min(entry.size_bytes, offset + length) if length else entry.size_bytes
            yield FileBytes(entry.size_bytes, chunks(directory / entry.name, offset, end, what="file"))

    def read_unit(self, extraction_id: str, unit: int, fence: int, *, sums: bool, offset: int) -> AsyncIterator[bytes]:
        """A file of a unit from `offset` on, in chunks of at most 1 MiB.

        Raises:
            errors.NotFound: it is not here.
            errors.Invalid: `offset` is behind the end.
        """
        path = self._units.find(extraction_id, unit, fence, sums=sums)
        if path is None:
            raise errors.NotFound(f"{extraction_id} has no such unit here", metadata={"unit": unit, "fence": fence})
        size = path.stat().st_size
        if offset > size:
            raise errors.Invalid.of("offset", f"the file has {size} bytes", size_bytes=size)
        return chunks(path, offset, size, what="unit")

    async def _require_intact(self, cache: Cache, directory: Path, entry: FileEntry) -> None:
        """Hash a file when it is first read, and again whenever it was touched."""
        try:
            status = (directory / entry.name).stat()
            seen = (cache.storage_uri, entry.name, status.st_mtime_ns, status.st_ctime_ns)
        except FileNotFoundError:
            seen = None
        if seen is not None and seen in self._intact:
            return
        problem = await asyncio.to_thread(problem_of, directory, entry)
        if problem is not None or seen is None:
            raise errors.Failed(
                f"{entry.name} of {cache.id} is {problem}",
                reason="CHECKSUM_MISMATCH",
                metadata={"id": cache.id, "file": entry.name, "problem": problem},
            )
        self._intact.add(seen)


def _entries(cache: Cache) -> dict[str, FileEntry]:
    """Every file of a cache by its name, with the digest that it must have."""
    manifest = Manifest.from_dict(cache.manifest)
    text = manifest.to_json().encode()
    own = FileEntry(MANIFEST, len(text), blake3(text).hexdigest())
    return {entry.name: entry for entry in (own, manifest.sequences, manifest.statistics, *manifest.shards)}


def _damage(directory: Path, cache: Cache) -> list[Damage]:
    try:
        reader = ShardReader(directory)
    except CorruptCache as error:
        return [Damage(-1, error.file, error.problem)]
    if reader.manifest != Manifest.from_dict(cache.manifest):
        return [Damage(-1, MANIFEST, "corrupt")]
    numbers = {entry.name: index for index, entry in enumerate(reader.manifest.shards)}
    return [Damage(numbers.get(entry.name, -1), entry.name, problem) for entry, problem in reader.verify()]
