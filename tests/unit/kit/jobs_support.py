"""Helpers of the job tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Claim, Handler, Job, JobStore, Worker
from tests.support import eventually


async def enqueue(store: JobStore, kind: str = "count", **options: Any) -> Job:
    settings = {"payload": {}, "created_by": "ada", "event_prefix": "job"} | options
    async with store.database.transaction() as conn:
        return await store.enqueue(conn, kind=kind, **settings)


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker runs within the block and drains at its end."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def worker_of(store: JobStore, handler: Handler, kind: str = "count", **options: Any) -> Worker:
    settings = {"device": "cpu", "incarnation": "w1", "limits": {}, "slots": 4, "drain_seconds": 5.0} | options
    return Worker(store, {kind: handler}, **settings)


async def reached(store: JobStore, job: Job, state: str) -> Job:
    """The job, as soon as it is in this state; a connection that was cut meanwhile is one look lost."""

    async def check() -> Job | None:
        with suppress(errors.Unavailable):
            found = await store.get(job.id)
            return found if found.state == state else None
        return None

    return await eventually(check)


async def lapse(database: Database, job_id: str) -> None:
    """Let the job's lease run out now."""
    await database.pool.execute("UPDATE jobs SET lease_until = clock_timestamp() WHERE id = $1", job_id)


async def events_of(database: Database, resource_id: str) -> list[str]:
    rows = await database.pool.fetch(
        "SELECT event, sequence FROM events WHERE resource_id = $1 ORDER BY sequence", resource_id
    )
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["event"].partition(":")[2] for row in rows]


class Gate:
    """A handler that says when it runs, and goes on, with checkpoints, until it is let go."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.claims: list[Claim] = []

    async def __call__(self, claim: Claim) -> dict[str, Any]:
        self.claims.append(claim)
        self.entered.set()
        await claim.unless_stopped(self.release.wait())
        return {"fence": claim.fence}
