"""Trainings on several devices: real ranks over gloo, the same batches and the same losses as one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import torch
from lensmesh.training.v1 import training_pb2 as pb

from services.kit.database import Database
from services.training.cache_rows import CacheRows
from services.training.compute import CoderPlan, TrainConfig, Trainer
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET
from tests.wire.training_support import BATCH, STEPS, Mesh, meshing

OPTIONS = {"dict_size": 256, "batch_size": BATCH, "num_tokens": STEPS * BATCH}
POINTS = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(10 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(60)]}
        yield mesh


def alone(cache_folder: Path) -> list[list[float]]:
    """Loss of both coders at each step, trained by one process."""
    plans = {
        kind: CoderPlan("pair", TrainConfig(activation=kind, top_k=top_k, **OPTIONS))
        for kind, top_k in (("topk", 8), ("batch_topk", 4))
    }
    trainer = Trainer(CacheRows(cache_folder, {"pair": POINTS}), plans)
    return [[report.loss for report in reports] for reports in trainer.run()]


async def test_two_ranks_lose_what_one_process_does_and_one_that_is_killed_changes_no_bit(
    mesh: Mesh, pids: list[int]
) -> None:
    wanted = {
        "layers": [1],
        "devices": 2,
        "variants": [{"activation": pb.ACTIVATION_BATCH_TOPK, "top_k": 4}],
        "num_tokens": STEPS * BATCH,
    }
    async with mesh.working():
        source = {"cache_id": (await mesh.cache()).cache_id}
        job = await mesh.create(source=source, **wanted)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        first, second = sorted(psutil.Process(pids[-1]).children(), key=lambda rank: rank.environ()["RANK"])
        second.kill()
        disturbed = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
        assert disturbed.status == pb.TRAINING_STATUS_COMPLETED, disturbed
        assert len(set(pids)) == 2
        assert not first.is_running()
        undisturbed = await mesh.create(source=source, **wanted)
        undisturbed = await mesh.reached(undisturbed.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    for one, other in zip(disturbed.transcoder_ids, undisturbed.transcoder_ids, strict=True):
        expected = await mesh.weights(other)
        for name, tensor in (await mesh.weights(one)).items():
            assert torch.equal(tensor, expected[name]), name
    losses = alone(await mesh.cache_folder(undisturbed.cache_id))
    history = await mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id=undisturbed.id))
    assert history.points[-1].step == STEPS
    for point in history.points:
        assert [coder.loss for coder in point.coders] == pytest.approx(losses[point.step - 1], rel=1e-4)
    one_rank = await mesh.create(source=source, validate_only=True, **{**wanted, "devices": 1})
    assert one_rank.estimated_memory_bytes < mesh.registry.reserved[job.id] < 2 * one_rank.estimated_memory_bytes
    assert mesh.registry.ledger == {}
