from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Claim, JobStore, StaleLease
from tests.support import eventually
from tests.unit.kit.jobs_support import Gate, enqueue, events_of, lapse, reached, worker_of, working


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, backoff_seconds=0.01)


async def test_nothing_counts_after_a_lost_lease(store: JobStore, database: Database) -> None:
    outcomes: list[Any] = []
    gate = Gate()

    async def sleeper(claim: Claim) -> dict:
        await gate(claim)
        for write in (
            lambda: claim.progress(50, {"late": True}, "job:progress"),
            lambda: claim.waiting("late"),
            claim.finalizing,
            lambda: _publish(claim),
            claim.checkpoint,
        ):
            try:
                await write()
            except StaleLease as error:
                outcomes.append(error.reason)
        return {"late": True}

    worker = worker_of(store, sleeper, incarnation="w1", slots=1)
    worker._renew = lambda _conn: asyncio.sleep(0)
    async with working(worker) as stopped:
        job = await enqueue(store, resource_id="r1")
        await gate.entered.wait()
        await lapse(database, job.id)  # as if the process had been stopped for longer than its lease
        successor = Gate()
        successor.release.set()
        async with working(worker_of(store, successor, incarnation="w2")):
            await reached(store, job, "completed")
        gate.release.set()
        await eventually(lambda: len(outcomes) == 5)
        assert outcomes == ["STALE_LEASE"] * 5
        assert not stopped.done()
    done = await store.get(job.id)
    assert (done.result, done.detail, done.progress, done.waiting_for) == ({"fence": 2}, {}, 100, None)
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams WHERE topic = 'm:1'") == 0
    assert await events_of(database, "r1") == ["queued", "started", "retrying", "started", "completed"]


async def _publish(claim: Claim) -> None:
    async with claim.commit() as conn:
        await conn.execute("INSERT INTO event_streams VALUES ('m:1', 'm', 1)")


async def test_a_lapsed_lease_counts_as_lost_even_if_nobody_took_the_job(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        await lapse(database, claim.job.id)
        await _publish(claim)
        return {}

    job = await enqueue(store)
    worker = worker_of(store, handler)
    async with working(worker):
        await eventually(lambda: worker.counts.stale_fences >= 1)
        await store.request_cancel(job.id)
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams WHERE topic = 'm:1'") == 0


async def test_a_handler_is_told_and_stopped_when_its_lease_is_lost(store: JobStore, database: Database) -> None:
    """The renewal finds the job with another owner."""
    gate = Gate()
    quick = JobStore(database, lease_seconds=0.9, backoff_seconds=3600)
    worker = worker_of(quick, gate)
    async with working(worker):
        job = await enqueue(store)
        await gate.entered.wait()
        await database.pool.execute("UPDATE jobs SET owner = 'somebody', fence = fence + 1 WHERE id = $1", job.id)
        await eventually(lambda: worker.counts.stale_fences == 1)
    assert gate.claims[0].lost


async def test_a_worker_that_cannot_renew_gives_up_before_its_lease_ends(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    quick = JobStore(database, lease_seconds=1.2, backoff_seconds=3600)
    lost_while_leased: list[bool] = []
    worker = worker_of(quick, gate)

    async def silence(*_: object) -> None:
        raise errors.Unavailable

    async with working(worker):
        job = await enqueue(store)
        await gate.entered.wait()
        monkeypatch.setattr(type(worker), "_renew", silence)
        monkeypatch.setattr(quick, "reap", lambda: asyncio.sleep(0))
        await eventually(lambda: gate.claims[0].lost)
        lost_while_leased.append(
            await database.pool.fetchval("SELECT lease_until > clock_timestamp() FROM jobs WHERE id = $1", job.id)
        )
    assert lost_while_leased == [True]
    assert worker.counts.renewal_failures >= 1


async def test_a_lease_is_renewed_as_long_as_the_handler_runs(store: JobStore, database: Database) -> None:
    gate = Gate()
    quick = JobStore(database, lease_seconds=2.0)
    worker = worker_of(quick, gate)
    query = "SELECT lease_until FROM jobs"
    async with working(worker):
        job = await enqueue(store)
        await gate.entered.wait()
        first = await database.pool.fetchval(query)

        async def renewed_past_its_first_end() -> bool:
            return await database.pool.fetchval("SELECT clock_timestamp() > $1::timestamptz + interval '2.5 s'", first)

        await eventually(renewed_past_its_first_end)
        gate.release.set()
        assert (await reached(store, job, "completed")).attempt == 1
    assert worker.counts.stale_fences == 0


async def test_a_long_commit_keeps_its_job(store: JobStore, database: Database) -> None:
    """The row lock protects the job while its own transaction outlives the lease."""
    quick = JobStore(database, lease_seconds=0.3)

    async def handler(claim: Claim) -> dict:
        async with claim.commit() as conn:
            await conn.execute("INSERT INTO event_streams VALUES ('m:1', 'm', 1)")
            await conn.execute("SELECT pg_sleep(0.9)")
        await claim.checkpoint()
        return {"fence": claim.fence}

    async with working(worker_of(quick, handler)), working(worker_of(quick, handler, incarnation="w2")):
        job = await enqueue(store)
        done = await reached(store, job, "completed")
    assert (done.result, done.attempt) == ({"fence": 1}, 1)


async def test_writes_inside_a_commit_join_it(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        try:
            async with claim.commit():
                await claim.progress(10, {"step": 1}, "job:progress")
                async with claim.commit() as conn:
                    await conn.execute("INSERT INTO event_streams VALUES ('m:1', 'm', 1)")
                raise KeyError
        except KeyError:
            pass
        return {}

    async with working(worker_of(store, handler)):
        done = await reached(store, await enqueue(store, resource_id="r1"), "completed")
    assert done.detail == {}
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams WHERE topic = 'm:1'") == 0
    assert await events_of(database, "r1") == ["queued", "started", "completed"]


async def test_two_tasks_of_one_handler_may_write_at_once(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        await asyncio.gather(*(claim.progress(n, {"n": n}) for n in range(10)))
        return {}

    async with working(worker_of(store, handler)):
        await reached(store, await enqueue(store), "completed")


# The database goes away


async def test_a_job_outlives_its_database_connections(store: JobStore, database: Database) -> None:
    """Every connection is cut while the handler works; what was acknowledged stays, and the job completes."""
    gate = Gate()

    async def handler(claim: Claim) -> dict:
        await claim.progress(10, {"step": 1}, "job:progress")
        await gate(claim)
        await claim.progress(20, {"step": 2}, "job:progress")
        return {"attempt": claim.job.attempt}

    worker = worker_of(store, handler)
    async with working(worker):
        job = await enqueue(store, resource_id="r1")
        await gate.entered.wait()
        with pytest.raises(errors.Unavailable):
            async with database.connection() as conn:
                await conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                )
        gate.release.set()
        done = await reached(store, job, "completed")
        assert (done.result, done.detail, done.attempt) == ({"attempt": 1}, {"step": 2}, 1)
        after = await enqueue(store)  # heard of, or found: the worker works on
        await reached(store, after, "completed")
    assert await events_of(database, "r1") == ["queued", "started", "progress", "progress", "completed"]


class _Outage:
    """The database's transactions fail while it lasts."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self.lasts = False
        real = database.transaction

        def transaction() -> Any:
            if self.lasts:
                self.failures += 1
                raise errors.Unavailable(transient=True)
            return real()

        monkeypatch.setattr(database, "transaction", transaction)


async def test_progress_and_the_end_of_a_job_wait_for_the_database(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage, ending = _Outage(database, monkeypatch), asyncio.Event()

    async def handler(claim: Claim) -> dict:
        outage.lasts = True
        told = asyncio.create_task(claim.progress(30, {"step": 1}))
        await eventually(lambda: outage.failures)
        outage.lasts = False
        await told
        outage.lasts, outage.failures = True, 0
        ending.set()
        return {"attempt": claim.job.attempt}

    async with working(worker_of(store, handler)):
        job = await enqueue(store)
        await ending.wait()
        await eventually(lambda: outage.failures)
        outage.lasts = False
        done = await reached(store, job, "completed")
    assert (done.detail, done.result) == ({"step": 1}, {"attempt": 1})


async def test_a_handler_that_waits_for_the_database_hears_that_its_lease_is_gone(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = _Outage(database, monkeypatch)
    heard: list[str] = []
    claims: list[Claim] = []

    async def handler(claim: Claim) -> dict:
        claims.append(claim)
        outage.lasts = True
        try:
            await asyncio.create_task(claim.progress(30, {"step": 1}))
        except (StaleLease, asyncio.CancelledError) as error:
            heard.append(type(error).__name__)
            raise
        return {}

    worker = worker_of(store, handler)
    async with working(worker):
        await enqueue(store)
        await eventually(lambda: outage.failures)
        claims[0].lose()
        await eventually(lambda: heard)
        outage.lasts = False
        await eventually(lambda: worker.counts.stale_fences == 1)


async def test_a_worker_that_cannot_give_its_jobs_back_ends_all_the_same(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = _Outage(database, monkeypatch)
    entered = asyncio.Event()

    async def handler(claim: Claim) -> dict:
        entered.set()
        await asyncio.Event().wait()
        return {}

    async with working(worker_of(store, handler, drain_seconds=0.0)):
        job = await enqueue(store)
        await entered.wait()
        outage.lasts = True
    left = await store.get(job.id)
    assert (left.state, left.owner) == ("running", "w1")


async def test_a_commit_that_loses_its_connection_publishes_nothing_and_is_tried_again(
    store: JobStore, database: Database
) -> None:
    async def handler(claim: Claim) -> dict:
        async with claim.commit() as conn:
            await conn.execute("INSERT INTO event_streams VALUES ($1, 'm', 1)", f"m:{claim.fence}")
            if claim.fence == 1:
                await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return {}

    async with working(worker_of(store, handler)):
        done = await reached(store, await enqueue(store), "completed")
    assert done.attempt == 2
    assert await database.pool.fetchval("SELECT array_agg(topic) FROM event_streams WHERE prefix = 'm'") == ["m:2"]
