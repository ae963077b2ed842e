from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Job, JobStore
from services.kit.jobs.transitions import QUERIES
from tests.unit.kit.jobs_support import enqueue, events_of, lapse


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


async def _claim(store: JobStore, owner: str = "w1", **limits: int) -> Job | None:
    return (await store.claim(["count"], "cpu", owner, limits))[0]


async def test_a_job_exists_exactly_if_its_transaction_commits(store: JobStore, database: Database) -> None:
    with pytest.raises(RuntimeError):
        async with database.transaction() as conn:
            await store.enqueue(conn, kind="count", payload={}, created_by="ada", event_prefix="job")
            raise RuntimeError
    assert await store.list() == ([], 0)
    assert await database.pool.fetchval("SELECT count(*) FROM events") == 0
    job = await enqueue(store, payload={"n": [1, "x"]}, job_id="job_1", device="cuda:0", priority=3)
    assert await store.get("job_1") == await store.get(job.id)
    assert (job.state, job.payload, job.device, job.priority, job.created_by) == (
        "queued",
        {"n": [1, "x"]},
        "cuda:0",
        3,
        "ada",
    )
    with pytest.raises(errors.AlreadyExists):
        await enqueue(store, job_id="job_1")


@pytest.mark.parametrize("verb", ["get", "request_cancel", "request_pause", "resume", "retry"])
async def test_an_unknown_job_is_not_found(store: JobStore, verb: str) -> None:
    with pytest.raises(errors.NotFound) as caught:
        await getattr(store, verb)("job_x")
    assert caught.value.metadata == {"job_id": "job_x"}


async def test_jobs_are_listed_newest_first_by_filter_and_page(store: JobStore) -> None:
    jobs = [
        await enqueue(store, "count", resource_id=f"r{n % 2}", created_by="bob" if n == 4 else "ada") for n in range(5)
    ]
    await enqueue(store, "other")
    ids = [job.id for job in reversed(jobs)]
    found, total = await store.list(kinds=["count"], limit=2, offset=1)
    assert ([job.id for job in found], total) == (ids[1:3], 5)
    found, total = await store.list(kinds=["count"], after=(found[-1].created_at, found[-1].id))
    assert ([job.id for job in found], total) == (ids[3:], 5)
    assert [job.id for job in (await store.list(resource_id="r1"))[0]] == [ids[1], ids[3]]
    assert [job.id for job in (await store.list(created_by="bob"))[0]] == [ids[0]]
    await store.request_cancel(ids[2])
    assert [job.id for job in (await store.list(states=["cancelled"]))[0]] == [ids[2]]
    assert (await store.list(kinds=["count"], states=["queued"]))[1] == 4


async def test_claims_go_by_priority_then_age_and_by_device(store: JobStore) -> None:
    low = await enqueue(store)
    high = await enqueue(store, priority=1)
    await enqueue(store, device="cuda:0", priority=9)
    await enqueue(store, "other", priority=9)
    assert [(await _claim(store)).id, (await _claim(store)).id] == [high.id, low.id]
    assert await _claim(store) is None
    assert (await store.claim(["count"], "cuda:0", "w2", {}))[0].device == "cuda:0"


async def test_a_claim_counts_and_fences(store: JobStore, database: Database) -> None:
    job = await enqueue(store)
    claimed = await _claim(store)
    assert (claimed.id, claimed.state, claimed.fence, claimed.attempt, claimed.owner) == (job.id, "running", 1, 1, "w1")
    await lapse(database, job.id)
    assert await store.reap() == 1
    await database.pool.execute("UPDATE jobs SET run_at = clock_timestamp()")
    again = await _claim(store, "w2")
    assert (again.id, again.fence, again.attempt, again.owner) == (job.id, 2, 2, "w2")
    assert again.started_at == claimed.started_at


async def test_a_lease_that_holds_is_left_alone(store: JobStore) -> None:
    await enqueue(store)
    await _claim(store)
    assert await store.reap() == 0
    assert await _claim(store, "w2") is None


async def test_a_crashed_attempt_is_queued_later_and_the_last_ends_the_job(store: JobStore, database: Database) -> None:
    job = await enqueue(store, resource_id="r1")
    delays = []
    for _ in range(3):
        await database.pool.execute("UPDATE jobs SET run_at = clock_timestamp()")
        assert await _claim(store) is not None
        await lapse(database, job.id)
        await store.reap()
        delays.append((await store.claim(["count"], "cpu", "w1", {}))[1])
    assert delays[0] is not None
    assert 0 < delays[0] <= 2 < delays[1] <= 4
    assert delays[2] is None
    dead = await store.get(job.id)
    assert (dead.state, dead.error_code, dead.attempt) == ("failed", "ATTEMPTS_EXHAUSTED", 3)
    assert "STALE_LEASE" in dead.error_message
    assert await events_of(database, "r1") == ["queued", *["started", "retrying"] * 2, "started", "failed"]


async def test_the_limit_of_a_kind_holds_across_all_workers(store: JobStore) -> None:
    for _ in range(8):
        await enqueue(store)
    claims = await asyncio.gather(*(_claim(store, f"w{n}", count=3) for n in range(8)))
    assert sum(claim is not None for claim in claims) == 3
    assert (await store.list(states=["running"]))[1] == 3


async def test_a_full_kind_does_not_block_the_others(store: JobStore) -> None:
    await enqueue(store, priority=9)
    await enqueue(store, priority=9)
    other = await enqueue(store, "other")
    first, _ = await store.claim(["count", "other"], "cpu", "w1", {"count": 1})
    second, _ = await store.claim(["count", "other"], "cpu", "w1", {"count": 1})
    assert (first.kind, second.id) == ("count", other.id)


async def test_a_full_queue_refuses(store: JobStore) -> None:
    await enqueue(store, queue_limit=2)
    await enqueue(store, queue_limit=2)
    with pytest.raises(errors.Exhausted) as caught:
        await enqueue(store, queue_limit=2)
    assert (caught.value.reason, caught.value.metadata) == ("QUEUE_FULL", {"queued": 2, "limit": 2})
    assert (await store.list())[1] == 2
    results = await asyncio.gather(*(enqueue(store, queue_limit=4) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(result, Job) for result in results) == 2


async def test_a_queued_job_says_what_it_waits_for(store: JobStore, database: Database) -> None:
    async def waits(job: Job) -> str | None:
        return (await store.get(job.id)).waiting_for

    announce = "INSERT INTO job_workers (incarnation, device, kinds, limits, slots) VALUES ($1, 'cpu', $2, $3, 1)"
    job = await enqueue(store)
    pinned = await enqueue(store, device="cuda:1")
    assert await waits(job) == "a worker for count"
    await database.pool.execute(announce, "w1", ["count"], {"count": 1})
    assert await waits(job) == "a free worker"
    assert await waits(pinned) == "a worker for count on cuda:1"
    second = await enqueue(store)
    assert (await _claim(store, count=1)).id == job.id
    assert await waits(job) is None
    assert await waits(second) == "the end of one of 1 running count jobs"
    await database.pool.execute("UPDATE jobs SET run_at = '2100-01-02T03:04:05Z' WHERE id = $1", second.id)
    assert await waits(second) == "the next attempt at 2100-01-02T03:04:05Z"
    await database.pool.execute("UPDATE job_workers SET seen_at = seen_at - interval '1 minute'")
    await database.pool.execute("UPDATE jobs SET run_at = created_at WHERE id = $1", second.id)
    assert await waits(second) == "a worker for count"


_ALLOWED: dict[str, dict[str, Any]] = {
    "queued": {"request_cancel": "cancelled", "request_pause": "paused"},
    "running": {"request_cancel": "running", "request_pause": "running"},
    "finalizing": {"request_cancel": "finalizing"},
    "paused": {"request_cancel": "cancelled", "request_pause": "paused", "resume": "queued"},
    "completed": {},
    "failed": {"retry": "queued"},
    "cancelled": {"request_cancel": "cancelled", "retry": "queued"},
}


@pytest.mark.parametrize("verb", ["request_cancel", "request_pause", "resume", "retry"])
@pytest.mark.parametrize("state", sorted(_ALLOWED))
async def test_verbs_by_state(store: JobStore, database: Database, state: str, verb: str) -> None:
    job = await enqueue(store)
    leased = state in Job.LEASED
    await database.pool.execute(
        "UPDATE jobs SET state = $1, owner = $2, lease_until = CASE WHEN $2::text IS NULL THEN NULL ELSE now() END",
        state,
        "w1" if leased else None,
    )
    if verb in _ALLOWED[state]:
        after = await getattr(store, verb)(job.id)
        assert after.state == (await store.get(job.id)).state == _ALLOWED[state][verb]
        if leased:
            assert after.cancel_requested == (verb == "request_cancel")
            assert after.pause_requested == (verb == "request_pause")
    else:
        with pytest.raises(errors.Conflict) as caught:
            await getattr(store, verb)(job.id)
        assert caught.value.metadata == {"job_id": job.id, "status": state}
        assert (await store.get(job.id)).state == state


async def test_a_verb_joins_the_callers_transaction(store: JobStore, database: Database) -> None:
    job = await enqueue(store)
    with pytest.raises(RuntimeError):
        async with database.transaction() as conn:
            await store.request_cancel(job.id, conn)
            raise RuntimeError
    assert (await store.get(job.id)).state == "queued"


async def test_a_pause_that_was_not_reached_can_be_taken_back(store: JobStore) -> None:
    job = await enqueue(store)
    await _claim(store)
    assert (await store.request_pause(job.id)).pause_requested
    resumed = await store.resume(job.id)
    assert (resumed.state, resumed.pause_requested) == ("running", False)


@pytest.mark.parametrize(("verb", "state"), [("request_cancel", "cancelled"), ("request_pause", "paused")])
async def test_what_was_asked_of_a_dead_worker_happens_when_its_lease_ends(
    store: JobStore, database: Database, verb: str, state: str
) -> None:
    job = await enqueue(store)
    await _claim(store)
    await getattr(store, verb)(job.id)
    await lapse(database, job.id)
    await store.reap()
    assert (await store.get(job.id)).state == state


async def test_a_retried_job_has_all_its_attempts_and_no_old_error(store: JobStore, database: Database) -> None:
    job = await enqueue(store)
    await database.pool.execute(
        "UPDATE jobs SET state = 'failed', attempt = 3, error_code = 'X', error_message = 'y', finished_at = now()"
    )
    again = await store.retry(job.id)
    assert (again.state, again.attempt, again.error_code, again.error_message, again.finished_at) == (
        "queued",
        0,
        None,
        None,
        None,
    )


async def test_a_limited_kind_is_left_to_a_worker_that_runs_fewer(store: JobStore, database: Database) -> None:
    async def announce(worker: str, *, slots: int = 2, kind: str = "count") -> None:
        await database.pool.execute(QUERIES["announce"], worker, "cpu", [kind], {}, slots)

    for worker in ("w1", "w2"):
        await announce(worker)
    await announce("no room", slots=0)
    await announce("other kind", kind="other")
    for _ in range(4):
        await enqueue(store)
    assert await _claim(store, "w1", count=9) is not None
    assert await _claim(store, "w1", count=9) is None
    assert await _claim(store, "w1") is not None  # where there is no limit the first one takes it
    assert await _claim(store, "w2", count=9) is not None
    lapsed = "UPDATE job_workers SET seen_at = seen_at - interval '1 minute' WHERE incarnation = 'w2'"
    await database.pool.execute(lapsed)
    assert await _claim(store, "w1", count=9) is not None  # nobody waits for the dead
