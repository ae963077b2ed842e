from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
import structlog

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Cancelled, Claim, Job, JobStore, Paused
from tests.support import eventually
from tests.unit.kit.jobs_support import Gate, enqueue, events_of, reached, worker_of, working


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, backoff_seconds=0.01)


async def test_a_job_runs_reports_and_completes(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        await claim.progress(40, {"tokens": 7}, "extraction:progress", {"samples": 3})
        claim.finish_data({"cache_id": "act_1"})
        return {"tokens": 9}

    async with working(worker_of(store, handler)):
        job = await enqueue(
            store, event_prefix="extraction", resource_id="ext_1", event_data={"model_id": "m_1"}, payload={"n": 1}
        )
        done = await reached(store, job, "completed")
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
        failed = await reached(store, job, "failed")
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
            failed = await reached(store, await enqueue(store), "failed")
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
        failed = await reached(store, await enqueue(store, resource_id="r1"), "failed")
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
        done = await reached(store, await enqueue(store), "completed")
    assert done.result == {"attempt": 3}
    assert (done.error_code, done.error_message) == (None, None)


async def test_a_cancelled_wait_inside_a_handler_is_a_transient_failure(store: JobStore) -> None:
    async def handler(claim: Claim) -> dict:
        if claim.job.attempt == 1:
            raise asyncio.CancelledError
        return {}

    async with working(worker_of(store, handler)):
        assert (await reached(store, await enqueue(store), "completed")).attempt == 2


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
        cancelled = await reached(store, await enqueue(store, resource_id="r1"), "cancelled")
    assert cancelled.finished_at is not None
    assert await events_of(database, "r1") == ["queued", "started", "cancelled"]


async def test_cancel_while_the_handler_waits_for_something(store: JobStore) -> None:
    gate = Gate()
    async with working(worker_of(store, gate)):
        job = await enqueue(store)
        await gate.entered.wait()
        await store.request_cancel(job.id)
        await reached(store, job, "cancelled")
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
        await reached(store, job, "cancelled")


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
        cancelled = await reached(store, await enqueue(store), "cancelled")
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
        cancelled = await reached(store, await enqueue(store), "cancelled")
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
        paused = await reached(store, job, "paused")
        assert (paused.owner, paused.pause_requested) == (None, False)
        await store.resume(job.id)
        done = await reached(store, job, "completed")
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
        done = await reached(store, job, "completed")
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
        await reached(store, job, "completed")


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
        await reached(store, job, "cancelled")
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
