"""A model that no device holds alone: one process has all of a training's devices and the model spread over them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1 import transcoders_pb2 as tpb

from services.kit.database import Database
from services.residency.lenses.transcoder import Transcoder
from services.training import requests
from services.training.adapters.processes import Processes
from services.training.compute import CoderPlan, TrainConfig, Trainer
from services.training.dialogue import Judge, Split, Start
from services.training.split_rows import SplitRows
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET
from tests.wire.test_training import texts
from tests.wire.training_support import BATCH, STEPS, Mesh, meshing

LAYERS, LAYER = 24, 20
WANTED = {"layers": [LAYER], "source": {"dataset_id": DATASET, "live": True, "split": True}, "devices": 2, "seed": 3}
PAIR = (f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out")


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(10 * BATCH))
    monkeypatch.setenv("LENSMESH_MODEL_ROOTS", str(models.saved("gpt2").parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(requests, "block_rows", lambda latents: 0)  # more than all of this model
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(20)}
        mesh.registry.folder = models.saved("gpt2", LAYERS)
        yield mesh


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Start | Judge]:
    """What processes were told; tokens stay after them."""
    told: list[Start | Judge] = []
    start = Processes.start

    def remember(self: Processes, first: Start | Judge) -> object:
        told.append(first)
        if not isinstance(first, Start):
            return start(self, first)
        assert first.split is not None
        (tmp_path / "kept").mkdir(exist_ok=True)
        for file in Path(first.split["folder"]).iterdir():
            (tmp_path / "kept" / file.name).write_bytes(file.read_bytes())
        return start(self, first)

    monkeypatch.setattr(Processes, "start", remember)
    return told


def alone(told: Start, folder: Path) -> Transcoder:
    """Trained here, on the rows of the same model on one device."""
    split = Split(**{**told.split, "spread": {"": 0}, "devices": ["cpu"], "folder": str(folder)})
    config = TrainConfig(dict_size=256, top_k=8, batch_size=BATCH, num_tokens=STEPS * BATCH, seed=3)
    with models.one_thread():
        trainer = Trainer(SplitRows(split, {"pair": PAIR}, "cpu"), {"coder": CoderPlan("pair", config)})
        list(trainer.run())
    return trainer.transcoders()["coder"]


async def test_a_split_model_trains_to_the_bits_of_an_undivided_one_and_is_evaluated_on_as_that(
    mesh: Mesh, kept: list[Start | Judge], tmp_path: Path
) -> None:
    job = await mesh.trained(**WANTED)
    assert (job.live, job.split, job.devices, job.step, job.cache_id) == (True, True, 2, STEPS, "")
    assert mesh.registry.loads == 0
    [told] = kept
    assert told.ranks == ["cpu"]
    places = [told.split["spread"][f"transformer.h.{layer}"] for layer in range(LAYERS)]
    assert (places[0], places[LAYER]) == (0, 1)
    weights = sum(file.stat().st_size for file in models.saved("gpt2", LAYERS).glob("*.safetensors"))
    assert weights < mesh.registry.reserved[job.id]
    assert mesh.registry.ledger == {}
    assert mesh.staged() == []
    expected = alone(told, tmp_path / "kept").state_dict()
    for name, tensor in (await mesh.weights(job.transcoder_ids[0])).items():
        assert torch.equal(tensor, expected[name]), name
    config = await mesh.stub.GetTrainingConfig(pb.GetTrainingConfigRequest(id=job.id))
    assert (config.source.live, config.source.split, config.devices) == (True, True, 2)

    divided = await evaluated(mesh, job.transcoder_ids[0], devices=2, samples_per_feature=1)
    assert mesh.registry.loads == 0
    assert [told.ranks for told in kept] == [["cpu"], ["cpu"]]
    assert kept[1].model["spread"][f"transformer.h.{LAYER}"] == 1
    assert weights < mesh.registry.reserved[divided.job_id]
    kind = (await mesh.context.jobs.get(divided.job_id)).kind
    assert mesh.parts[-1].limits[kind] == 1  # the next one finds no room beside it
    assert (mesh.registry.ledger, mesh.staged()) == ({}, [])
    whole = await evaluated(mesh, job.transcoder_ids[0])
    assert mesh.registry.loads == 1
    assert abs(divided.ce_clean - divided.ce_zero_ablated) > 1e-3
    assert divided.mode == pb.EVALUATION_MODE_FULL
    assert divided.kl == pytest.approx(whole.kl, rel=1e-3)
    for name in ("fvu", "l0", "ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "tokens"):
        assert getattr(divided, name) == pytest.approx(getattr(whole, name), rel=1e-6), name
    active = max(range(256), key=lambda latent: expected["W_dec"][latent].norm())
    feature = await mesh.transcoders.GetFeature(tpb.GetFeatureRequest(id=job.transcoder_ids[0], feature=active))
    assert len(feature.top_logits) == 10
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await evaluated(mesh, job.transcoder_ids[0], devices=2, mode=pb.EVALUATION_MODE_CPU)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def evaluated(mesh: Mesh, transcoder_id: str, **fields: Any) -> pb.Evaluation:
    wanted = pb.EvaluateTranscoderRequest(id=transcoder_id, dataset_id=DATASET, num_batches=2, batch_size=4, **fields)
    queued = await mesh.stub.EvaluateTranscoder(wanted)

    async def done() -> pb.Evaluation | None:
        found = await mesh.stub.ListEvaluations(pb.ListEvaluationsRequest(id=transcoder_id))
        return next((one for one in found.evaluations if one.job_id == queued.job_id), None)

    async with mesh.working():
        return await eventually(done, timeout=60)


@pytest.mark.demo
async def test_a_kill_changes_no_bit(mesh: Mesh, pids: list[int]) -> None:
    async with mesh.working():
        job = await mesh.create(**WANTED)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        os.kill(pids[-1], signal.SIGKILL)
        killed = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    undisturbed = await mesh.trained(**WANTED)
    assert killed.status == pb.TRAINING_STATUS_COMPLETED, killed
    assert len(set(pids)) == 3
    expected = await mesh.weights(undisturbed.transcoder_ids[0])
    for name, tensor in (await mesh.weights(killed.transcoder_ids[0])).items():
        assert torch.equal(tensor, expected[name]), name


async def test_files_that_were_changed_are_not_trained_on(mesh: Mesh, tmp_path: Path) -> None:
    saved = models.saved("gpt2", LAYERS)
    mesh.registry.folder = shutil.copytree(saved, tmp_path / saved.name)
    config = mesh.registry.folder / "config.json"
    config.write_text(config.read_text() + "\n")
    async with mesh.working():
        job = await mesh.create(**WANTED)
        failed = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert (failed.status, failed.error_code) == (pb.TRAINING_STATUS_FAILED, "CHECKSUM_MISMATCH")
    assert mesh.registry.ledger == {}
