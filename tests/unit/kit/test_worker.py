from __future__ import annotations

import pytest

from services.kit.database import Database
from services.kit.jobs import Claim, JobStore
from tests.support import eventually
from tests.unit.kit.jobs_support import enqueue, events_of, worker_of, working


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, backoff_seconds=0.01)


async def _state(store: JobStore, job_id: str, state: str) -> bool:
    return (await store.get(job_id)).state == state


async def test_a_job_runs_reports_and_completes(store: JobStore, database: Database) -> None:
    async def handler(claim: Claim) -> dict:
        await claim.progress(40, {"tokens": 7}, "extraction:progress", {"samples": 3})
        claim.finish_data({"cache_id": "act_1"})
        return {"tokens": 9}

    async with working(worker_of(store, handler)):
        job = await enqueue(
            store, event_prefix="extraction", resource_id="ext_1", event_data={"model_id": "m_1"}, payload={"n": 1}
        )
        await eventually(lambda: _state(store, job.id, "completed"))
    done = await store.get(job.id)
    assert (done.result, done.detail, done.progress, done.attempt, done.fence) == (
        {"tokens": 9},
        {"tokens": 7},
        100,
        1,
        1,
    )
    assert done.started_at is not None
    assert done.finished_at is not None
    assert await events_of(database, "ext_1") == ["queued", "started", "progress", "completed"]
    rows = await database.pool.fetch("SELECT data FROM events ORDER BY sequence")
    common = {"job_id": job.id, "extraction_id": "ext_1", "model_id": "m_1"}
    for row in rows:
        assert common.items() <= row["data"].items()
    assert {"samples": 3, "progress": 40, "status": "running"}.items() <= rows[2]["data"].items()
    assert {"cache_id": "act_1", "progress": 100, "status": "completed"}.items() <= rows[3]["data"].items()
