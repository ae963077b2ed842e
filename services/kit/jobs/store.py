"""The table of jobs as the services see it: queue, read, stop and start again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from services.kit import errors
from services.kit.database import Database
from services.kit.ids import new_id
from services.kit.jobs import transitions
from services.kit.jobs.job import Job
from services.kit.jobs.transitions import QUERIES, job_of

Page = tuple[list[Job], int]
"""Some of the jobs that match, and how many do in all."""


class JobStore:
    """Jobs in PostgreSQL; every change is one transaction, every time is the database's."""

    def __init__(
        self, database: Database, *, lease_seconds: float = 30.0, max_attempts: int = 3, backoff_seconds: float = 2.0
    ) -> None:
        """Use `database`.

        Args:
            database: where the table is.
            lease_seconds: how long a claim holds without renewal, by the database's clock.
            max_attempts: how often a job is started before transient failures and crashes end it.
            backoff_seconds: pause before the second attempt; it doubles each time.
        """
        self.database = database
        self.lease = timedelta(seconds=lease_seconds)
        self.max_attempts = max_attempts
        self.backoff = timedelta(seconds=backoff_seconds)

    async def enqueue(
        self,
        conn: asyncpg.Connection,
        *,
        kind: str,
        payload: dict[str, Any],
        created_by: str,
        resource_id: str | None = None,
        event_prefix: str,
        event_data: dict[str, Any] | None = None,
        job_id: str | None = None,
        device: str | None = None,
        priority: int = 0,
        lane: str | None = None,
        queue_limit: int | None = None,
    ) -> Job:
        """Queue a job in the caller's transaction; workers hear of it when that commits.

        Args:
            conn: connection in a transaction.
            kind: names the handler.
            payload: what to do, plain JSON.
            created_by: the caller's subject.
            resource_id: the resource that its events tell of; the job itself when left out.
            event_prefix: first part of its events' names.
            event_data: facts that each of its events shall carry, for example the model's id.
            job_id: its id, `job_…` when left out.
            device: the only device that may run it.
            priority: higher goes first.
            lane: of the jobs of this kind and lane one runs at a time; the kind must be one that workers limit.
            queue_limit: how many jobs of this kind may wait.

        Raises:
            errors.Exhausted: `QUEUE_FULL`.
            errors.AlreadyExists: `job_id` is taken.
        """
        if queue_limit is not None:
            await self._check_queue(conn, kind, queue_limit)
        job_id = job_id or new_id("job")
        row = await conn.fetchrow(
            QUERIES["enqueue"],
            job_id,
            kind,
            payload,
            created_by,
            resource_id or job_id,
            event_prefix,
            event_data or {},
            device,
            priority,
            lane,
        )
        job = job_of(row)
        await transitions.tell(conn, job, "queued")
        await conn.execute(QUERIES["notify"], kind)
        return job

    async def get(self, job_id: str) -> Job:
        """The job now.

        Raises:
            errors.NotFound: there is none.
        """
        async with self.database.connection() as conn:
            row = await conn.fetchrow(QUERIES["get"], job_id)
        if row is None:
            raise _not_found(job_id)
        return job_of(row)

    async def list(
        self,
        *,
        kinds: Iterable[str] | None = None,
        states: Iterable[str] | None = None,
        resource_id: str | None = None,
        created_by: str | None = None,
        after: tuple[datetime, str] | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> Page:
        """Jobs that match all filters, newest first.

        Args:
            kinds: only these.
            states: only in these.
            resource_id: only of this resource.
            created_by: only of this caller.
            after: (created_at, id) of the last job of the page before.
            limit: most jobs in the page.
            offset: jobs to skip.
        """
        filters = (_list(kinds), _list(states), resource_id, created_by)
        async with self.database.connection() as conn:
            rows = await conn.fetch(QUERIES["list"], *filters, *(after or (None, None)), limit, offset)
            total = await conn.fetchval(QUERIES["count"], *filters)
        return [job_of(row) for row in rows], total

    async def request_cancel(self, job_id: str, conn: asyncpg.Connection | None = None) -> Job:
        """Stop the job for good: at once where nobody runs it, else at its handler's next checkpoint.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has completed or failed already.
        """
        async with self._locked(job_id, conn) as (conn_, job):
            if job.state == "cancelled":
                return job
            if job.ended:
                raise _wrong_state(job, "cancelled")
            if job.state not in Job.LEASED:
                return await transitions.cancel(conn_, job)
            await conn_.execute(QUERIES["notify"], f"stop:{job_id}")
            return job_of(await conn_.fetchrow(QUERIES["request_cancel"], job_id))

    async def request_pause(self, job_id: str, conn: asyncpg.Connection | None = None) -> Job:
        """Stop the job so that it can be resumed: at once where nobody runs it, else at the next checkpoint.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has ended, or its result is being made.
        """
        async with self._locked(job_id, conn) as (conn_, job):
            match job.state:
                case "paused":
                    return job
                case "queued":
                    return await transitions.pause(conn_, job)
                case "running":
                    await conn_.execute(QUERIES["notify"], f"stop:{job_id}")
                    return job_of(await conn_.fetchrow(QUERIES["request_pause"], job_id, True))
                case _:
                    raise _wrong_state(job, "paused")

    async def resume(self, job_id: str, conn: asyncpg.Connection | None = None) -> Job:
        """Queue a paused job, or take back a pause that was not reached yet.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it is not paused.
        """
        async with self._locked(job_id, conn) as (conn_, job):
            if job.state == "running" and job.pause_requested:
                await conn_.execute(QUERIES["notify"], f"stop:{job_id}")
                return job_of(await conn_.fetchrow(QUERIES["request_pause"], job_id, False))
            if job.state != "paused":
                raise _wrong_state(job, "resumed")
            return await transitions.again(conn_, job, "resumed", attempt=0)

    async def retry(self, job_id: str, conn: asyncpg.Connection | None = None) -> Job:
        """Queue a failed or cancelled job again, with all its attempts.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it is neither failed nor cancelled.
        """
        async with self._locked(job_id, conn) as (conn_, job):
            if job.state not in {"failed", "cancelled"}:
                raise _wrong_state(job, "retried")
            return await transitions.again(conn_, job, "queued", attempt=0)

    async def claim(
        self, kinds: Iterable[str], device: str, owner: str, limits: Mapping[str, int]
    ) -> tuple[Job | None, float | None]:
        """Lease the next job for `owner`; where none can be, say when the next that waits for its time is due.

        Args:
            kinds: what the worker can do.
            device: where it runs.
            owner: incarnation of the worker.
            limits: per kind, how many jobs may be leased in the whole system; counted under a lock. Jobs of these kinds
                are left to workers that run fewer of them.

        Returns:
            The job and None, or None and seconds (None: no job waits for its time).
        """
        kinds = set(kinds)
        limited = sorted(kinds & limits.keys())
        async with self.database.transaction() as conn:
            free = kinds - await self._full(conn, limited, limits) if limited else kinds
            row = await conn.fetchrow(QUERIES["claim"], sorted(free), device, owner, self.lease, limited)
            if row is None:
                return None, await conn.fetchval(QUERIES["seconds_to_next"], sorted(kinds), device)
            job = job_of(row)
            await transitions.tell(conn, job, "started", {"attempt": job.attempt})
        return job, None

    async def reap(self) -> int:
        """Take jobs away from workers that stopped renewing their leases; returns how many."""
        async with self.database.transaction() as conn:
            jobs = [job_of(row) for row in await conn.fetch(QUERIES["lapsed"])]
            for job in sorted(jobs, key=lambda job: (job.event_prefix, job.resource_id)):
                await self._take_away(conn, job)
        return len(jobs)

    async def _take_away(self, conn: asyncpg.Connection, job: Job) -> None:
        if job.cancel_requested:
            await transitions.cancel(conn, job)
        elif job.pause_requested:
            await transitions.pause(conn, job)
        else:
            message = "the worker stopped renewing its lease"
            await self.retry_or_fail(conn, job, "STALE_LEASE", message)

    async def retry_or_fail(self, conn: asyncpg.Connection, job: Job, code: str, message: str) -> None:
        """After a transient failure of a locked job."""
        await transitions.retry_or_fail(conn, job, code, message, max_attempts=self.max_attempts, backoff=self.backoff)

    async def _full(self, conn: asyncpg.Connection, limited: Iterable[str], limits: Mapping[str, int]) -> set[str]:
        for kind in limited:
            await conn.execute(QUERIES["lock_limit"], kind)
        leased = {row["kind"]: row["jobs"] for row in await conn.fetch(QUERIES["leased"], limited)}
        return {kind for kind in limited if leased.get(kind, 0) >= limits[kind]}

    async def _check_queue(self, conn: asyncpg.Connection, kind: str, limit: int) -> None:
        await conn.execute(QUERIES["lock_limit"], kind)
        queued = await conn.fetchval(QUERIES["count"], [kind], ["queued"], None, None)
        if queued >= limit:
            raise errors.Exhausted(
                f"{queued} {kind} jobs wait already",
                reason="QUEUE_FULL",
                metadata={"queued": queued, "limit": limit},
                retry_after=30.0,
            )

    @asynccontextmanager
    async def _locked(
        self, job_id: str, conn: asyncpg.Connection | None
    ) -> AsyncIterator[tuple[asyncpg.Connection, Job]]:
        if conn is None:
            async with self.database.transaction() as own, self._locked(job_id, own) as found:
                yield found
            return
        row = await conn.fetchrow(QUERIES["lock"], job_id)
        if row is None:
            raise _not_found(job_id)
        yield conn, job_of(row)


def _list(values: Iterable[str] | None) -> list[str] | None:
    return None if values is None else [*values]


def _not_found(job_id: str) -> errors.NotFound:
    return errors.NotFound(f"There is no job {job_id}", metadata={"job_id": job_id})


def _wrong_state(job: Job, wanted: str) -> errors.Conflict:
    return errors.Conflict(
        f"Job {job.id} is {job.state} and cannot be {wanted}", metadata={"job_id": job.id, "status": job.state}
    )
