"""Help with an extraction that another process works on: units are leased, made, and given to it.

On its own disk their files go into its folder; on another host they stay here until it has fetched them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import numpy as np
from torch import Tensor

from services.extraction.adapters.caches import PublishedCaches
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.metrics import ExtractionMetrics
from services.extraction.adapters.postgres import QUERIES
from services.extraction.adapters.run import lease_unit, sums
from services.extraction.compute import Moments, Plan, Unit
from services.extraction.domain import Options, Task
from services.extraction.job_ports import NotNeeded
from services.kit import errors
from services.kit.artifacts import full_disk_named
from services.kit.database import Database
from services.kit.logs import get_logger

T = TypeVar("T")
LOOK_SECONDS = 1.0
HELP_AFTER = timedelta(seconds=5)
"""How long a job has run before others load its model to help: shorter ones end sooner without."""


class HelpingRun:
    """Implements the port `Filler` under leases of units; the job is another process's, which also publishes."""

    def __init__(
        self,
        database: Database,
        caches: PublishedCaches,
        metrics: ExtractionMetrics,
        *,
        extraction_id: str,
        holder: str,
        address: str,
        lease: timedelta,
    ) -> None:
        """Use these.

        Args:
            database: where units are leased.
            caches: whose store the units go to.
            metrics: counts what is written.
            extraction_id: what is helped.
            holder: who helps, until this process ends.
            address: where other hosts reach this process.
            lease: how long a unit is ours without renewal.
        """
        self._database = database
        self._metrics = metrics
        self._id = extraction_id
        self._holder = holder
        self._address = address
        self._lease = lease
        self._folder = WorkFolder(caches.artifacts.root, extraction_id)
        self._fences: dict[int, int] = {}
        self._plan_digest = ""
        self._needed = True

    async def begin(self) -> Task:
        """What is to be done.

        Raises:
            NotNeeded: the extraction was deleted meanwhile.
        """
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["helped"], self._id)
        if row is None:
            raise NotNeeded
        self._plan_digest = row["plan_digest"]
        if self._folder.opened_under(row["fence"]):
            self._address = ""
        options = Options.from_json(row["options"])
        return Task(self._id, row["model_id"], row["dataset_id"], options, None, self._plan_digest)

    async def kept_plan(self) -> Mapping[str, np.ndarray] | None:
        """On the disk of the job's own worker; elsewhere it is made again and has to have the same digest."""
        return await asyncio.to_thread(self._folder.read_plan)

    def joins(self, plan: Plan) -> None:
        """That the units are cut here as they are there.

        Raises:
            NotNeeded: they are not.
        """
        if plan.digest != self._plan_digest:
            raise NotNeeded

    @asynccontextmanager
    async def leasing(self) -> AsyncIterator[None]:
        """Leases are renewed within the block, and given back at its end."""
        if self._address:
            await asyncio.to_thread(self._folder.open)
        renewal = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            renewal.cancel()
            if self._address and not self._fences:
                await asyncio.to_thread(self._folder.discard)
            with suppress(errors.Unavailable):  # they expire by themselves
                async with self._database.connection() as conn:
                    await conn.execute(QUERIES["release_units"], self._id, self._holder)

    async def checkpoint(self) -> None:
        """Raises NotNeeded when the job has ended or is to stop."""
        if not self._needed:
            raise NotNeeded

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`."""
        return await work

    async def lease_unit(self) -> int | None:
        """For the length of a lease."""
        async with self._database.transaction() as conn:
            row = await lease_unit(
                conn,
                self._id,
                address=self._address,
                holder=self._holder,
                plan_digest=self._plan_digest,
                lease=self._lease,
            )
        if row is None:
            return None
        self._fences[row["unit"]] = row["fence"]
        return row["unit"]

    async def save_unit(self, unit: Unit, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        """Files first, the row last; it counts while the job runs and the unit is still ours."""
        fence = self._fences[unit.index]
        try:
            with full_disk_named():
                entry = await asyncio.to_thread(self._folder.write, unit.index, fence, tensors, sums(moments))
        except FileNotFoundError as error:  # the job has ended and cleaned up
            raise NotNeeded from error
        async with self._database.transaction() as conn:
            running = await conn.fetchval(QUERIES["lock_job"], self._id)
            row = (self._id, unit.index, fence, entry.size_bytes, entry.digest)
            counts = running is not None and await conn.fetchval(QUERIES["add_unit"], *row) is not None
        if not counts:
            await asyncio.to_thread(self._folder.discard_unit, unit.index, fence)
            raise NotNeeded
        self._metrics.written(unit.rows, entry.size_bytes)

    async def _renew(self) -> None:
        every = min(LOOK_SECONDS, self._lease.total_seconds() / 3)
        while self._needed:
            await asyncio.sleep(every)
            with suppress(errors.Unavailable):
                async with self._database.connection() as conn:
                    self._needed = await conn.fetchval(
                        QUERIES["keep_units"], self._id, self._holder, self._plan_digest, self._lease
                    )


class Helper:
    """Looks for extractions to help while this process has none of its own."""

    def __init__(self, database: Database, *, incarnation: str, device: str) -> None:
        self._database = database
        self._incarnation = incarnation
        self._device = device
        self._refused: set[str] = set()

    async def keep_helping(self, idle: Callable[[], bool], help_with: Callable[[str], Awaitable[None]]) -> None:
        """Until cancelled: `help_with` an extraction's id whenever this process is `idle` and there is one."""
        while True:
            with suppress(errors.Unavailable):
                found = await self._found() if idle() else None
                if found is not None:
                    await self._help(found, help_with)
            await asyncio.sleep(LOOK_SECONDS)

    async def _found(self) -> str | None:
        """One that was not tried in vain before."""
        facts = (self._incarnation, self._device, sorted(self._refused), HELP_AFTER)
        async with self._database.connection() as conn:
            return await conn.fetchval(QUERIES["to_help"], *facts)

    async def _help(self, extraction_id: str, help_with: Callable[[str], Awaitable[None]]) -> None:
        try:
            await help_with(extraction_id)
        except NotNeeded:
            self._refused.add(extraction_id)
        except errors.Unavailable:
            raise
        except (errors.LensmeshError, OSError, RuntimeError, ValueError) as error:
            # The job's own worker meets what concerns the job; this process must not end of it.
            get_logger("extraction").warning("no help", extraction=extraction_id, error=type(error).__name__)
            self._refused.add(extraction_id)
