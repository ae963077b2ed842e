"""What the job table promises to every service: at-least-once execution, exactly-once publication."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.kit.database import Database
from services.kit.events import EventLog
from services.kit.jobs import Claim, Job, JobStore
from tests.contract.job_process import STEPS, TABLE, publish_steps
from tests.support import die_with_parent, eventually
from tests.unit.kit.jobs_support import enqueue, worker_of, working

LEASE_SECONDS = 1.0


@asynccontextmanager
async def worker_process(dsn: str, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.contract.job_process",
        dsn,
        name,
        str(LEASE_SECONDS),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def _completed(store: JobStore, job: Job) -> Job:
    async def check() -> Job | None:
        found = await store.get(job.id)
        return found if found.state == "completed" else None

    return await eventually(check, timeout=60)


async def _publications(database: Database) -> list[tuple[int, int]]:
    return [tuple(row) for row in await database.pool.fetch("SELECT step, fence FROM publications ORDER BY step")]


async def _contiguous(database: Database, job: Job) -> list[str]:
    events = await EventLog(database).after([f"job:{job.id}"], {})
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.event for event in events]


async def test_two_workers_race_a_thousand_jobs(database: Database, database_url: str) -> None:
    store = JobStore(database)
    await database.pool.execute(TABLE)
    async with database.transaction() as conn:
        for n in range(1000):
            await store.enqueue(conn, kind="count", payload={"n": n}, created_by="ada", event_prefix="job")

    runs: list[tuple[str, int]] = []

    async def handler(claim: Claim) -> dict:
        runs.append((claim.job.id, claim.fence))
        async with claim.commit() as conn:
            await conn.execute("INSERT INTO publications VALUES ($1, 1, $2)", claim.job.id, claim.fence)
        return {"n": claim.job.payload["n"]}

    other = JobStore(await Database.open(database_url, min_size=1, max_size=5))
    async with (
        working(worker_of(store, handler, incarnation="w1")) as first,
        working(worker_of(other, handler, incarnation="w2")) as second,
    ):

        async def done() -> bool:
            assert not first.done()
            assert not second.done()
            return (await store.list(states=["completed"], limit=1))[1] == 1000

        await eventually(done, timeout=100)
    await other.database.close()
    assert len(runs) == len(set(runs)) == 1000
    assert Counter(fence for _, fence in runs) == {1: 1000}
    rows = await database.pool.fetch(
        "SELECT j.payload, j.result, j.fence, p.fence AS published FROM jobs j JOIN publications p ON p.job_id = j.id"
    )
    assert sorted(row["result"]["n"] for row in rows) == list(range(1000))
    assert all(row["result"] == row["payload"] and row["fence"] == row["published"] == 1 for row in rows)


async def test_a_job_whose_worker_is_killed_goes_on_in_another(database: Database, database_url: str) -> None:
    store = JobStore(database)
    await database.pool.execute(TABLE)
    job = await enqueue(store, "steps")
    async with worker_process(database_url, "w1") as first:
        assert await _line(first) == "halfway"
        first.kill()
        await first.wait()
        assert await _publications(database) == [(step, 1) for step in range(1, 5)]
        async with worker_process(database_url, "w2"):
            done = await _completed(store, job)
    assert (done.attempt, done.fence, done.result) == (2, 2, {"started_at_step": 5})
    assert await _publications(database) == [(step, 1 if step < 5 else 2) for step in range(1, STEPS + 1)]
    told = await _contiguous(database, job)
    assert told.count("job:completed") == told.count("job:retrying") == 1
    assert told.count("job:progress") >= STEPS - 1  # a step may be published and its progress not told


async def test_a_worker_that_was_stopped_publishes_nothing_when_it_wakes(database: Database, database_url: str) -> None:
    store = JobStore(database, lease_seconds=LEASE_SECONDS, backoff_seconds=0.01)
    await database.pool.execute(TABLE)
    job = await enqueue(store, "steps")
    async with worker_process(database_url, "zombie") as zombie:
        assert await _line(zombie) == "halfway"
        zombie.send_signal(signal.SIGSTOP)

        async def handler(claim: Claim) -> dict:
            return await publish_steps(claim, database, "living")

        async with working(worker_of(store, handler, "steps", incarnation="living")):
            done = await _completed(store, job)
        assert zombie.stdin is not None
        zombie.stdin.write(b"\n")
        zombie.send_signal(signal.SIGCONT)
        # It finds its lease lost: by its own clock, by its renewal or by its write.
        after = await enqueue(store, "steps")
        assert (await _line(zombie)) in {"stale", "halfway"}
        zombie.stdin.write(b"\n\n")
        await _completed(store, after)
    assert (done.fence, done.result) == (2, {"started_at_step": 5})
    assert await store.get(job.id) == done
    own = await database.pool.fetch("SELECT step, fence FROM publications WHERE job_id = $1 ORDER BY step", job.id)
    assert [tuple(row) for row in own] == [(step, 1 if step < 5 else 2) for step in range(1, STEPS + 1)]
    assert (await _contiguous(database, job)).count("job:completed") == 1


async def test_a_worker_that_is_asked_to_end_hands_its_job_on(database: Database, database_url: str) -> None:
    store = JobStore(database)
    entered = asyncio.Event()

    async def slow(claim: Claim) -> dict:
        entered.set()
        await claim.unless_stopped(asyncio.Event().wait())
        return {}

    async def quick(claim: Claim) -> dict:
        return {"fence": claim.fence}

    async with working(worker_of(store, slow, incarnation="w1")):
        job = await enqueue(store)
        await entered.wait()
    async with working(worker_of(store, quick, incarnation="w2")):
        done = await _completed(store, job)
    assert (done.attempt, done.result) == (1, {"fence": 2})
