from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import structlog

from services.kit import audit, housekeeping
from services.kit.artifacts import ArtifactStore
from services.kit.auth import Caller
from services.kit.database import Database
from services.kit.events import emit
from services.kit.idempotency import idempotent
from services.kit.jobs import JobStore
from services.kit.jobs.metrics import attempts, job_counts, oldest_queued_seconds
from services.kit.requests import RequestKey
from tests.support import eventually
from tests.unit.kit.jobs_support import enqueue, lapse


@asynccontextmanager
async def _running(work: Coroutine) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _fill(database: Database) -> None:
    await audit.AuditLog(database).record(Caller("ada"), "m", "r", "OK")
    async with database.transaction() as conn:
        await emit(conn, "model:loading", "m_1", {})
        await emit(conn, "model:ready", "m_1", {})
        async with idempotent(conn, RequestKey("a", "m", "r", b"")) as request:
            request.answer = {}


async def test_what_is_old_is_forgotten_and_what_is_not_stays(database: Database) -> None:
    await _fill(database)
    assert await housekeeping.purge(database) == {"events": 0, "requests": 0, "audit": 0}
    await database.pool.execute("UPDATE events SET relayed_at = now(), created_at = created_at - interval '8 days'")
    await database.pool.execute("UPDATE idempotent_requests SET created_at = created_at - interval '8 days'")
    await database.pool.execute("UPDATE audit_log SET at = at - interval '91 days'")
    assert await housekeeping.purge(database) == {"events": 1, "requests": 1, "audit": 1}


async def test_the_house_is_kept_at_start(database: Database, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with store.staging("shard") as staged:
        (staged / "a").write_bytes(b"1")
        async with database.transaction() as conn:
            artifact = await store.publish(conn, "shard", staged, {})
    await database.pool.execute("DELETE FROM artifacts")
    with structlog.testing.capture_logs() as logs:
        async with _running(housekeeping.keep_house(database, store, grace=timedelta(0))):
            await eventually(lambda: any(entry["event"] == "house kept" for entry in logs))
    assert not store.location(artifact.uri).exists()


async def test_the_numbers_of_the_job_table(database: Database) -> None:
    store = JobStore(database)
    for _ in range(3):
        await enqueue(store)
    await enqueue(store, "other")
    await store.request_cancel((await enqueue(store, "done")).id)
    await database.pool.execute("UPDATE jobs SET created_at = created_at - interval '1 minute' WHERE kind = 'count'")
    job, _ = await store.claim(["count"], "cpu", "w1", {})
    await lapse(database, job.id)
    await store.reap()
    await database.pool.execute("UPDATE jobs SET run_at = created_at")
    await store.claim(["count"], "cpu", "w1", {})
    async with database.connection() as conn:
        assert await job_counts(conn) == {
            ("count", "queued"): 2,
            ("count", "running"): 1,
            ("done", "cancelled"): 1,
            ("other", "queued"): 1,
        }
        assert await attempts(conn) == {"count": 2, "done": 0, "other": 0}
        oldest = await oldest_queued_seconds(conn)
    assert oldest["count"] >= 60 > oldest["other"] > oldest["done"] == 0
