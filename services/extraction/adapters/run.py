"""A claimed extraction job: its row, its units and their files, its cache."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import numpy as np
from torch import Tensor

from services.extraction.adapters.caches import NewCache, PublishedCaches
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.metrics import ExtractionMetrics
from services.extraction.adapters.postgres import QUERIES, finish_reused
from services.extraction.adapters.remote import RemoteUnits
from services.extraction.adapters.tensor_files import write_tensors
from services.extraction.compute import Moments, Plan, Unit, merged, plan_arrays
from services.extraction.domain import ARTIFACT_KIND, EVENT_PREFIX, REUSED_MESSAGE, Cache, Options, Task
from services.extraction.job_ports import Product
from services.kit import errors
from services.kit.artifacts import full_disk_named
from services.kit.jobs import Claim, Paused, StaleLease
from services.kit.waiting import cancel_all
from services.residency.shards import MANIFEST, SEQUENCES, STATISTICS, Manifest, ShardEntry, shard_name

T = TypeVar("T")
Units = dict[int, tuple[int, int, str]]
"""Of each committed unit: fence, bytes, digest."""
FETCHED_AT_ONCE = 4
"""Units that come from other hosts at the same time, each a chunk at a time."""


class ClaimedRun:
    """Implements the port `Run`: every write is in a transaction that checks the fence first."""

    def __init__(self, claim: Claim, caches: PublishedCaches, metrics: ExtractionMetrics, remote: RemoteUnits) -> None:
        self._claim = claim
        self._caches = caches
        self._metrics = metrics
        self._remote = remote
        self._id = claim.job.resource_id
        self._folder = WorkFolder(caches.artifacts.root, self._id)
        self._units: Units = {}
        self._fences: dict[int, int] = {}
        self._taken: list[int] = []
        self._plan_digest = ""
        self._task: Task | None = None

    async def begin(self) -> Task:
        """The extraction's row."""
        async with self._claim.commit() as conn:
            row = await conn.fetchrow(QUERIES["claimed"], self._id)
        if row is None:
            raise errors.NotFound(f"There is no extraction {self._id}", metadata={"id": self._id})
        options = Options.from_json(row["options"])
        self._task = Task(self._id, row["model_id"], row["dataset_id"], options, row["cache_id"], row["plan_digest"])
        if row["cache_id"] is not None:
            await self.discard()
            self._claim.finish_data({"cache_id": row["cache_id"], "reused": False})
        return self._task

    async def ahead(self) -> str | None:
        """Of the same content, with all of our hook points."""
        async with self._claim.commit() as conn:
            return await conn.fetchval(QUERIES["ahead"], self._id)

    async def checkpoint(self) -> None:
        """Raises when the job is to stop, or the lease is lost."""
        await self._claim.checkpoint()

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, or the reason to stop."""
        return await self._claim.unless_stopped(work)

    async def waiting(self, reason: str | None) -> None:
        """Shown as `waiting_for`."""
        await self._claim.waiting(reason)

    async def progress(self, percent: float, figures: Mapping[str, Any], *, tell: bool) -> None:
        """The row, and where `tell` the event of spec/003 appendix E."""
        event = f"{EVENT_PREFIX}:progress" if tell else None
        await self._claim.progress(percent, dict(figures), event, {"status": "extracting", **figures})

    async def kept_plan(self) -> Mapping[str, np.ndarray] | None:
        """In the job's folder; the job's row holds its digest."""
        return await asyncio.to_thread(self._folder.read_plan)

    async def resume(self, plan: Plan, samples: int, size_bytes: int) -> set[int]:
        """Rows of another plan or host are dropped, and so are those whose files are not what they were."""
        store_id = self._caches.artifacts.store_id
        await asyncio.to_thread(self._open, plan)
        async with self._claim.commit() as conn:
            await conn.execute(QUERIES["drop_units"], self._id, store_id, plan.digest)
            await conn.execute(QUERIES["release_units"], self._id, self._claim.job.id)
            await conn.execute(QUERIES["set_plan"], self._id, plan.digest, samples, len(plan.units), store_id)
        self._plan_digest = plan.digest
        await self.done()
        for unit, (fence, size, digest) in list(self._units.items()):
            if not await asyncio.to_thread(self._folder.intact, unit, fence, size, digest):
                del self._units[unit]
                async with self._claim.commit() as conn:
                    await conn.execute(QUERIES["drop_unit"], self._id, unit)
        await self._caches.make_room(size_bytes - sum(size for _, size, _ in self._units.values()))
        return set(self._units)

    async def lease_unit(self) -> int | None:
        """For ever: whoever takes the job over releases it."""
        if self._taken:
            return self._taken.pop()
        leased: int | None = None

        async def lease() -> None:
            nonlocal leased
            async with self._claim.commit() as conn:
                row = await lease_unit(
                    conn,
                    self._id,
                    address="",
                    holder=self._claim.job.id,
                    plan_digest=self._plan_digest,
                    lease=None,
                )
            if row is not None:
                leased, self._fences[row["unit"]] = row["unit"], row["fence"]

        await self._claim.insist(lease)
        return leased

    async def done(self) -> set[int]:
        """As the rows say, whoever made them; those of other hosts are fetched, or else taken over."""
        rows: list[asyncpg.Record] = []

        async def read() -> None:
            nonlocal rows
            async with self._claim.commit() as conn:
                rows = await conn.fetch(QUERIES["units"], self._id)

        await self._claim.insist(read)
        units = {row["unit"]: (row["fence"], row["size_bytes"], row["digest"]) for row in rows}
        for number in await self._fetched({row["unit"]: row["address"] for row in rows if row["address"]}, units):
            del units[number]
        self._units = units
        return set(units)

    async def _fetched(self, addresses: Mapping[int, str], units: Units) -> set[int]:
        """Fetch units from these addresses, several at once; those that cannot be had whole are taken over."""
        room = asyncio.Semaphore(FETCHED_AT_ONCE)

        async def fetch(number: int) -> tuple[int, bool]:
            async with room:
                with full_disk_named():
                    there = await self._remote.fetch(addresses[number], self._folder, number, units[number][0])
                return number, there and await asyncio.to_thread(self._folder.intact, number, *units[number])

        taken = set()
        tasks = [asyncio.create_task(fetch(number)) for number in addresses]
        try:
            for task in asyncio.as_completed(tasks):
                number, whole = await self._claim.unless_stopped(task)
                if not whole:
                    taken.add(number)
                await self._settle(number, units[number][0], whole=whole)
        finally:
            await cancel_all(tasks)
        return taken

    async def _settle(self, number: int, fence: int, *, whole: bool) -> None:
        """Say that a unit is here, or take it over."""

        async def settle() -> None:
            async with self._claim.commit() as conn:
                if whole:
                    await conn.execute(QUERIES["fetched_unit"], self._id, number, fence)
                else:
                    taken = (self._id, number, self._claim.job.id)
                    self._fences[number] = await conn.fetchval(QUERIES["take_unit"], *taken)

        await self._claim.insist(settle)
        if not whole:
            self._taken.append(number)

    async def save_unit(self, unit: Unit, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        """Files first, the row last; only then the unit counts."""
        fence = self._fences[unit.index]
        with full_disk_named():
            entry = await asyncio.to_thread(self._folder.write, unit.index, fence, tensors, sums(moments))

        async def commit() -> None:
            async with self._claim.commit() as conn:
                row = (self._id, unit.index, fence, entry.size_bytes, entry.digest)
                assert await conn.fetchval(QUERIES["add_unit"], *row) is not None, "nobody else leases our units"

        await self._claim.insist(commit)
        self._metrics.written(unit.rows, entry.size_bytes)

    async def moments(self, plan: Plan) -> dict[str, Moments]:
        """Read back from the units' files, whichever attempt wrote them."""

        def read() -> dict[str, Moments]:
            parts = []
            for unit in plan.units:
                tensors = self._folder.read_moments(unit.index, self._units[unit.index][0])
                names = [name.removesuffix(".count") for name in tensors if name.endswith(".count")]
                parts.append({name: Moments.from_tensors(tensors, name) for name in names})
            return merged(parts)

        return await asyncio.to_thread(read)

    async def publish(self, product: Product) -> str:
        """Link the units into a directory of the store, publish it, and complete the extraction in one transaction."""
        assert self._task is not None, "a run begins before it publishes"
        await self._claim.finalizing()
        artifacts = self._caches.artifacts
        with artifacts.staging(ARTIFACT_KIND) as staged:
            manifest = await asyncio.to_thread(self._assemble, staged, product)
            await self._caches.make_room(manifest.size_bytes - sum(size for _, size, _ in self._units.values()))
            sealed = await asyncio.to_thread(artifacts.seal, staged)
            async with self._claim.commit() as conn:
                artifact = await artifacts.publish(conn, ARTIFACT_KIND, staged, {"extraction_id": self._id}, sealed)
                seconds = await conn.fetchval(QUERIES["elapsed"], self._claim.job.id)
                cache_id = await self._caches.insert(
                    conn, self._row(self._task, product, manifest, seconds), artifact.uri, artifact.size_bytes
                )
                identity = max(manifest.identity_errors.values(), default=None)
                figures = (manifest.tokens, manifest.samples, seconds, product.tokens_per_second, identity)
                await conn.execute(QUERIES["finish"], self._id, cache_id, False, *figures)
                await conn.execute(QUERIES["drop_all_units"], self._id)
        self._claim.finish_data({"cache_id": cache_id, "reused": False})
        await self.discard()
        self._metrics.cache_bytes.set(await self._caches.bytes_used())
        return cache_id

    async def reuse(self, cache: Cache) -> None:
        """Complete with a cache that was made meanwhile."""
        async with self._claim.commit() as conn:
            await finish_reused(conn, self._id, cache.id)
        self._claim.finish_data({"cache_id": cache.id, "reused": True, "message": REUSED_MESSAGE})

    def _open(self, plan: Plan) -> None:
        self._folder.open(self._claim.fence)
        self._folder.write_plan(plan_arrays(plan))

    async def discard(self) -> None:
        """Delete the files of units."""
        await asyncio.to_thread(self._folder.discard)

    def _assemble(self, staged: Path, product: Product) -> Manifest:
        shards = []
        for unit in product.plan.units:
            fence, size_bytes, digest = self._units[unit.index]
            name = shard_name(unit.index)
            os.link(self._folder.shard(unit.index, fence), staged / name)
            shards.append(ShardEntry(name, size_bytes, digest, rows=unit.rows, sequences=len(unit.sequences)))
        sequences = write_tensors(staged / SEQUENCES, product.sequences)
        statistics = write_tensors(staged / STATISTICS, product.statistics)
        manifest = product.describe(tuple(shards), sequences, statistics)
        (staged / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _row(self, task: Task, product: Product, manifest: Manifest, seconds: float) -> NewCache:
        layers = {point.layer for point in manifest.hook_points if isinstance(point.layer, int)}
        return NewCache(
            model_id=task.model_id,
            dataset_id=task.dataset_id,
            layers=sorted(layers),
            samples=manifest.samples,
            seconds=seconds,
            shape=list(product.shape),
            key=product.key,
            hook_points=list(manifest.names),
            manifest=manifest.to_dict(),
        )


def sums(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Tensors of a unit's sums."""
    found: dict[str, Tensor] = {}
    for name, moment in moments.items():
        found |= moment.tensors(name)
    return found


async def lease_unit(
    conn: asyncpg.Connection,
    extraction_id: str,
    *,
    address: str,
    holder: str,
    plan_digest: str,
    lease: timedelta | None,
) -> asyncpg.Record | None:
    """Number and fence of a unit that is nobody's, one caller after the other; in a transaction."""
    await conn.execute(QUERIES["lock_units"], extraction_id)
    return await conn.fetchrow(QUERIES["lease_unit"], extraction_id, address, holder, plan_digest, lease)


async def handled(run: ClaimedRun, work: Callable[[ClaimedRun], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Do the work; what it leaves on the disk stays only where a later attempt can use it."""
    try:
        with full_disk_named():
            return await work(run)
    except (Paused, StaleLease, OSError):
        raise
    except Exception as error:
        if not (isinstance(error, errors.LensmeshError) and error.transient):
            await run.discard()
        raise
