from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
import structlog

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Cancelled, Claim, Job, JobStore, Paused, StaleLease
from tests.support import eventually
from tests.unit.kit.jobs_support import Gate, enqueue, events_of, lapse, worker_of, working


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, backoff_seconds=0.01)


async def _reached(store: JobStore, job: Job, state: str) -> Job:
    async def check() -> Job | None:
        found = await store.get(job.id)
        return found if found.state == state else None

    return await eventually(check)


async def test_a_job_runs_reports_and_completes(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        await claim.progress(40, {"tokens": 7}, "extraction:progress", {"samples": 3})
        claim.finish_data({"cache_id": "act_1"})
        return {"tokens": 9}

    async with working(worker_of(store, handler)):
        job = await enqueue(
            store, event_prefix="extraction", resource_id="ext_1", event_data={"model_id": "m_1"}, payload={"n": 1}
        )
        done = await _reached(store, job, "completed")
    assert (done.result, done.detail, done.progress) == ({"tokens": 9}, {"tokens": 7}, 100)
    assert (done.attempt, done.fence, done.owner) == (1, 1, None)
    assert done.started_at is not None
    assert done.finished_at is not None
    assert await events_of(database, "ext_1") == ["queued", "started", "progress", "completed"]
    rows = await database.pool.fetch("SELECT data FROM events ORDER BY sequence")
    common = {"job_id": job.id, "extraction_id": "ext_1", "model_id": "m_1"}
    for row in rows:
        assert common.items() <= row["data"].items()
    assert {"samples": 3, "progress": 40, "status": "running"}.items() <= rows[2]["data"].items()
    assert {"cache_id": "act_1", "progress": 100, "status": "completed"}.items() <= rows[3]["data"].items()


async def test_a_known_failure_keeps_its_reason_and_is_not_repeated(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        raise errors.Exhausted("too big", reason="INSUFFICIENT_MEMORY", metadata={"required_memory_gb": 8})

    async with working(worker_of(store, handler)):
        job = await enqueue(store, resource_id="r1")
        failed = await _reached(store, job, "failed")
    assert (failed.error_code, failed.error_message, failed.attempt) == ("INSUFFICIENT_MEMORY", "too big", 1)
    assert await events_of(database, "r1") == ["queued", "started", "failed"]
    data = await database.pool.fetchval("SELECT data FROM events WHERE event = 'job:failed'")
    assert data["error_code"] == "INSUFFICIENT_MEMORY"
    assert data["details"] == {"required_memory_gb": 8}


async def test_an_unknown_failure_tells_an_id_only_and_logs_the_rest(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        raise ValueError("/secret/path")

    with structlog.testing.capture_logs() as logs:
        async with working(worker_of(store, handler)):
            failed = await _reached(store, await enqueue(store), "failed")
    assert failed.error_code == "INTERNAL"
    assert "secret" not in failed.error_message
    (entry,) = [entry for entry in logs if entry["event"] == "job failed"]
    assert entry["message"] == failed.error_message
    assert str(entry["exc_info"]) == "/secret/path"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.Unavailable("registry away", transient=True), "UNAVAILABLE", "registry away"),
        (OSError(errno.EIO, "Input/output error", "/secret/path"), "UNAVAILABLE", "Input/output error"),
        (ConnectionResetError(), "UNAVAILABLE", "ConnectionResetError"),
    ],
)
async def test_a_transient_failure_is_tried_three_times_and_its_cause_kept(
    store: JobStore, database: Database, error: Exception, code: str, message: str
) -> None:
    calls = []

    async def handler(claim: Claim) -> dict:
        calls.append(claim.fence)
        raise error

    async with working(worker_of(store, handler)):
        failed = await _reached(store, await enqueue(store, resource_id="r1"), "failed")
    assert calls == [1, 2, 3]
    assert failed.error_code == "ATTEMPTS_EXHAUSTED"
    assert f"{code}: " in failed.error_message
    assert message in failed.error_message
    assert "secret" not in failed.error_message
    assert await events_of(database, "r1") == ["queued", *["started", "retrying"] * 2, "started", "failed"]


async def test_a_failure_that_passes_ends_well(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        if claim.job.attempt < 3:
            raise ConnectionResetError
        return {"attempt": claim.job.attempt}

    async with working(worker_of(store, handler)):
        done = await _reached(store, await enqueue(store), "completed")
    assert done.result == {"attempt": 3}
    assert (done.error_code, done.error_message) == (None, None)


async def test_a_cancelled_wait_inside_a_handler_is_a_transient_failure(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        if claim.job.attempt == 1:
            raise asyncio.CancelledError
        return {}

    async with working(worker_of(store, handler)):
        assert (await _reached(store, await enqueue(store), "completed")).attempt == 2


# Cancel at every phase


async def test_cancel_while_queued_for_another_attempt(store: JobStore, database: Database) -> None:
    patient = JobStore(database, backoff_seconds=3600)

    async def handler(claim: Claim) -> dict:
        raise ConnectionResetError

    job = await enqueue(store)
    async with working(worker_of(patient, handler)):
        await eventually(lambda: _waits_for_attempt(store, job))
        assert (await store.request_cancel(job.id)).state == "cancelled"


async def _waits_for_attempt(store: JobStore, job: Job) -> bool:
    return "next attempt" in ((await store.get(job.id)).waiting_for or "")


async def test_cancel_between_batches(store: JobStore, database: Database) -> None:
    batches = []

    async def handler(claim: Claim) -> dict:
        while True:
            batches.append(1)
            if len(batches) == 3:
                await store.request_cancel(claim.job.id)
            await claim.checkpoint()

    async with working(worker_of(store, handler)):
        cancelled = await _reached(store, await enqueue(store, resource_id="r1"), "cancelled")
    assert cancelled.finished_at is not None
    assert await events_of(database, "r1") == ["queued", "started", "cancelled"]


async def test_cancel_while_the_handler_waits_for_something(store: JobStore) -> None:
    gate = Gate()
    async with working(worker_of(store, gate)):
        job = await enqueue(store)
        await gate.entered.wait()
        await store.request_cancel(job.id)
        await _reached(store, job, "cancelled")
    assert not gate.release.is_set()


async def test_cancel_while_the_result_is_made(store: JobStore) -> None:
    entered = asyncio.Event()

    async def handler(claim: Claim) -> dict:
        await claim.finalizing()
        entered.set()
        await claim.unless_stopped(asyncio.Event().wait())
        return {}

    async with working(worker_of(store, handler)):
        job = await enqueue(store)
        await entered.wait()
        assert (await store.get(job.id)).state == "finalizing"
        with pytest.raises(errors.Conflict):
            await store.request_pause(job.id)
        await store.request_cancel(job.id)
        await _reached(store, job, "cancelled")


async def test_cancel_during_a_commit_waits_for_it_and_counts(store: JobStore, database: Database) -> None:
    asked: list[asyncio.Task[Job]] = []

    async def handler(claim: Claim) -> dict:
        async with claim.commit() as conn:
            asked.append(asyncio.create_task(store.request_cancel(claim.job.id)))
            await eventually(lambda: _blocked(database))
            await conn.execute("INSERT INTO event_streams VALUES ('m:1', 'm', 1)")
        await asked[0]
        return {"published": True}

    async with working(worker_of(store, handler)):
        cancelled = await _reached(store, await enqueue(store), "cancelled")
    # The handler ended without a checkpoint, but the cancel was acknowledged first.
    assert cancelled.result == {}
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams WHERE topic = 'm:1'") == 1


async def _blocked(database: Database) -> bool:
    return bool(
        await database.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


@pytest.mark.parametrize("error", [ConnectionResetError(), ValueError("x"), Paused()])
async def test_a_cancelled_job_that_fails_at_the_same_time_is_cancelled(store: JobStore, error: Exception) -> None:
    async def handler(claim: Claim) -> dict:
        await store.request_cancel(claim.job.id)
        raise error

    async with working(worker_of(store, handler)):
        cancelled = await _reached(store, await enqueue(store), "cancelled")
    assert cancelled.error_code is None


# Pause, drain


async def test_a_paused_job_goes_on_from_its_checkpoint(store: JobStore, database: Database) -> None:
    saved: list[int] = []

    async def handler(claim: Claim) -> dict:
        step = saved[-1] if saved else 0
        try:
            while step < 6:
                step += 1
                if step == 3 and claim.fence == 1:
                    await store.request_pause(claim.job.id)
                    await eventually(lambda: claim.stopping)
                await claim.checkpoint()
        except Paused:
            saved.append(step)
            raise
        return {"step": step, "from": saved[-1]}

    async with working(worker_of(store, handler)):
        job = await enqueue(store, resource_id="r1")
        paused = await _reached(store, job, "paused")
        assert (paused.owner, paused.pause_requested) == (None, False)
        await store.resume(job.id)
        done = await _reached(store, job, "completed")
    assert done.result == {"step": 6, "from": 3}
    assert await events_of(database, "r1") == ["queued", "started", "paused", "resumed", "started", "completed"]


async def test_a_worker_that_ends_gives_its_jobs_back_without_counting_the_attempt(
    store: JobStore, database: Database
) -> None:
    first, second = Gate(), Gate()
    async with working(worker_of(store, first, incarnation="w1")):
        job = await enqueue(store, resource_id="r1")
        await first.entered.wait()
    back = await store.get(job.id)
    assert (back.state, back.attempt, back.owner) == ("queued", 0, None)
    assert await database.pool.fetchval("SELECT count(*) FROM job_workers") == 0
    second.release.set()
    async with working(worker_of(store, second, incarnation="w2")):
        done = await _reached(store, job, "completed")
    assert (done.result, done.attempt) == ({"fence": 2}, 1)
    assert await events_of(database, "r1") == ["queued", "started", "queued", "started", "completed"]


async def test_a_handler_that_does_not_stop_is_stopped_after_the_drain_time(store: JobStore) -> None:
    entered, stopped = asyncio.Event(), asyncio.Event()

    async def handler(claim: Claim) -> dict:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return {}

    async with working(worker_of(store, handler, drain_seconds=0.0)):
        job = await enqueue(store)
        await entered.wait()
    assert stopped.is_set()
    back = await store.get(job.id)
    assert (back.state, back.attempt) == ("queued", 0)


async def test_a_pause_asked_for_while_the_worker_ends_stays_a_pause(store: JobStore) -> None:
    gate = Gate()
    async with working(worker_of(store, gate)):
        job = await enqueue(store)
        await gate.entered.wait()
        await store.request_pause(job.id)
        await eventually(lambda: gate.claims[0].stopping)
    assert (await store.get(job.id)).state == "paused"


# Leases


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
            await _reached(store, job, "completed")
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
    quick = JobStore(database, lease_seconds=0.6)
    worker = worker_of(quick, gate)
    query = "SELECT lease_until FROM jobs"
    async with working(worker):
        job = await enqueue(store)
        await gate.entered.wait()
        first = await database.pool.fetchval(query)

        async def renewed_past_its_first_end() -> bool:
            return await database.pool.fetchval("SELECT clock_timestamp() > $1::timestamptz + interval '1 s'", first)

        await eventually(renewed_past_its_first_end)
        gate.release.set()
        assert (await _reached(store, job, "completed")).attempt == 1
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
        done = await _reached(store, job, "completed")
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
        done = await _reached(store, await enqueue(store, resource_id="r1"), "completed")
    assert done.detail == {}
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams WHERE topic = 'm:1'") == 0
    assert await events_of(database, "r1") == ["queued", "started", "completed"]


async def test_two_tasks_of_one_handler_may_write_at_once(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        await asyncio.gather(*(claim.progress(n, {"n": n}) for n in range(10)))
        return {}

    async with working(worker_of(store, handler)):
        await _reached(store, await enqueue(store), "completed")


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
        done = await _reached(store, job, "completed")
        assert (done.result, done.detail, done.attempt) == ({"attempt": 1}, {"step": 2}, 1)
        after = await enqueue(store)  # heard of, or found: the worker works on
        await _reached(store, after, "completed")
    assert await events_of(database, "r1") == ["queued", "started", "progress", "progress", "completed"]


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
        done = await _reached(store, await enqueue(store), "completed")
    assert done.attempt == 2
    assert await database.pool.fetchval("SELECT array_agg(topic) FROM event_streams WHERE prefix = 'm'") == ["m:2"]


# Waiting and stopping


async def test_a_running_job_says_what_it_waits_for(store: JobStore) -> None:
    gate = Gate()

    async def handler(claim: Claim) -> dict:
        await claim.waiting("memory on cuda:0")
        await gate(claim)
        await claim.waiting(None)
        return {}

    async with working(worker_of(store, handler)):
        job = await enqueue(store)
        await gate.entered.wait()
        assert (await store.get(job.id)).waiting_for == "memory on cuda:0"
        gate.release.set()
        await _reached(store, job, "completed")


async def test_what_an_interrupted_wait_was_doing_is_cancelled(store: JobStore) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("work cancelled")
            raise

    async def handler(claim: Claim) -> dict:
        asyncio.get_running_loop().call_soon(asked.set)
        try:
            await claim.unless_stopped(work())
        except Cancelled:
            seen.append("handler told")
            raise
        return {}

    asked = asyncio.Event()
    async with working(worker_of(store, handler)):
        job = await enqueue(store)
        await asked.wait()
        await store.request_cancel(job.id)
        await _reached(store, job, "cancelled")
    assert seen == ["work cancelled", "handler told"]


async def test_a_slot_that_frees_elsewhere_wakes_a_worker_at_its_limit(store: JobStore) -> None:
    first, second = Gate(), Gate()
    options: dict[str, Any] = {"limits": {"count": 1}}
    async with (
        working(worker_of(store, first, incarnation="w1", **options)),
        working(worker_of(store, second, incarnation="w2", **options)),
    ):
        for _ in range(2):
            await enqueue(store)
        await eventually(lambda: first.entered.is_set() or second.entered.is_set())
        assert (await store.list(states=["running"]))[1] == 1
        for gate in (first, second):
            gate.release.set()
        await eventually(lambda: _completed(store, 2))
    assert len(first.claims) + len(second.claims) == 2


async def _completed(store: JobStore, count: int) -> bool:
    return (await store.list(states=["completed"]))[1] == count
