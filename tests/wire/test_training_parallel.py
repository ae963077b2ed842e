"""Trainings side by side: one per host while another host is idle, on cores that they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from lensmesh.extraction.v1 import extraction_pb2
from lensmesh.training.v1 import training_pb2 as pb

from services.kit.database import Database
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET
from tests.wire.training_support import BATCH, STEPS, Mesh, meshing


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(10 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(60)]}
        yield mesh


async def test_an_idle_host_takes_the_second_training_and_neither_spins_on_the_cores_they_share(
    mesh: Mesh, database: Database
) -> None:
    async def both_known() -> bool:
        return bool(await database.pool.fetchval("SELECT count(*) = 2 FROM job_workers"))

    async def owners() -> list[str]:
        return sorted([(await mesh.context.jobs.get(job.id)).owner or "" for job in jobs])

    async with mesh.working("host-1"):
        source = {"cache_id": (await mesh.cache()).cache_id}
        async with mesh.working("host-2"):
            await eventually(both_known)
            endless = {"layers": [1], "source": source, "num_tokens": 10_000 * STEPS * BATCH}
            jobs = [await mesh.create(**endless) for _ in range(2)]
            for job in jobs:
                await eventually(lambda job=job: mesh.has_checkpoint(job.id), timeout=60)
            assert await owners() == ["host-1", "host-2"]
            running = [
                process for process in psutil.Process().children() if "services.training.child" in process.cmdline()
            ]
            for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):
                assert [process.environ()[name] for process in running] == [value, value]
            assert [(await mesh.get(job.id)).threads for job in jobs] == [1, 1]
            assert len(mesh.registry.ledger) == 2
            for job in jobs:
                await mesh.stub.CancelTrainingJob(pb.CancelTrainingJobRequest(id=job.id))
            await asyncio.gather(*(mesh.reached(job.id, pb.TRAINING_STATUS_CANCELLED) for job in jobs))
    assert mesh.registry.ledger == {}


async def test_trainings_that_start_together_from_one_dataset_share_its_extraction(mesh: Mesh) -> None:
    wanted = {"layers": [1], "source": {"dataset_id": DATASET}}
    jobs = [await mesh.create(**wanted, seed=seed) for seed in (1, 2)]
    async with mesh.working():
        done = [await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED) for job in jobs]
    assert [one.status for one in done] == [pb.TRAINING_STATUS_COMPLETED] * 2
    assert done[0].cache_id == done[1].cache_id
    found = (await mesh.extraction.ListExtractions(extraction_pb2.ListExtractionsRequest())).extractions
    assert sorted(one.reused for one in found) == [False, True]
