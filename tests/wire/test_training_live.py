"""Trainings from a live stream: nothing is stored, and what happens to the process changes no bit."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2
from lensmesh.training.v1 import training_pb2 as pb

from services.extraction import streaming
from services.kit.database import Database
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL
from tests.wire.test_training import texts
from tests.wire.training_support import BATCH, STEPS, Mesh, meshing

LIVE = {"dataset_id": DATASET, "live": True}


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(10 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100 * (2 * models.WIDTH * 4 + streaming.TABLE_BYTES))
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60)}
        yield mesh


async def test_a_live_training_stores_nothing_and_a_kill_changes_no_bit(mesh: Mesh, pids: list[int]) -> None:
    wanted = {"source": LIVE, "seed": 3}
    async with mesh.working():
        job = await mesh.create(**wanted)
        assert job.live
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        first = pids[-1]
        os.kill(first, signal.SIGKILL)
        killed = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
        undisturbed = await mesh.create(**wanted)
        undisturbed = await mesh.reached(undisturbed.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert killed.status == undisturbed.status == pb.TRAINING_STATUS_COMPLETED, (killed, undisturbed)
    assert pids[0] == first != pids[-1]
    assert killed.step == undisturbed.step == STEPS
    for ours, theirs in zip(killed.transcoder_ids, undisturbed.transcoder_ids, strict=True):
        expected = await mesh.weights(theirs)
        for name, tensor in (await mesh.weights(ours)).items():
            assert torch.equal(tensor, expected[name]), name

    assert not killed.cache_id
    caches = await mesh.extraction.ListActivationCaches(extraction_pb2.ListActivationCachesRequest())
    assert list(caches.activation_caches) == []
    assert mesh.staged() == []
    record = mesh.registry.pool.get(MODEL)
    await eventually(lambda: _true(not record.leases))
    config = await mesh.stub.GetTrainingConfig(pb.GetTrainingConfigRequest(id=killed.id))
    assert (config.source.live, config.source.dataset_id) == (True, DATASET)


async def test_a_stream_that_there_cannot_be_fails_the_training_with_its_reason(mesh: Mesh) -> None:
    mesh.registry.texts = {DATASET: [""]}
    async with mesh.working():
        job = await mesh.create(source=LIVE)
        failed = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert (failed.status, failed.error_code) == (pb.TRAINING_STATUS_FAILED, "DATASET_UNUSABLE")
    assert mesh.registry.ledger == {}


async def _true(value: bool) -> bool:
    return value
