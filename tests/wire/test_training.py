"""TrainingService over real gRPC and PostgreSQL, its trainings in real processes, on a tiny GPT-2."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.training.v1 import training_pb2 as pb

from services.kit.database import Database
from services.kit.events import EventLog
from services.residency.lenses.transcoder import Transcoder
from services.training.cache_rows import CacheRows
from services.training.compute import CoderPlan, TrainConfig, Trainer
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL
from tests.wire.training_support import BATCH, HELD_OUT, STEPS, Mesh, meshing


def texts(count: int, first: int = 0) -> list[str]:
    return [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(first, first + count)]


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(10 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60), HELD_OUT: texts(24, 1000)}
        yield mesh


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    """(code, reason, named fields) of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return caught.value.code(), info.reason, [violation.field for violation in bad.field_violations]


def undisturbed(cache_folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """What the same training gives in this process, by layer."""
    options = {"dict_size": 256, "top_k": 8, "batch_size": BATCH, "num_tokens": STEPS * BATCH}
    plans, pairs = {}, {}
    for layer in (1, 3):
        pair = (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        pairs[str(layer)] = pair
        plans[str(layer)] = CoderPlan(str(layer), TrainConfig(**options))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = Trainer(CacheRows(cache_folder, pairs), plans)
    for _ in trainer.run():
        pass
    torch.set_num_threads(before)
    return {
        int(name): {key: tensor for key, tensor in coder.state_dict().items() if tensor is not None}
        for name, coder in trainer.transcoders().items()
    }


async def made(mesh: Mesh, job: pb.TrainingJob) -> dict[int, pb.Transcoder]:
    found = [await mesh.transcoder(transcoder_id) for transcoder_id in job.transcoder_ids]
    return {transcoder.layer: transcoder for transcoder in found}


async def assert_undisturbed(mesh: Mesh, job: pb.TrainingJob) -> None:
    """The job's transcoders are bit for bit those of a training that nothing happened to."""
    expected = undisturbed(await mesh.cache_folder(job.cache_id))
    transcoders = await made(mesh, job)
    assert transcoders.keys() == {1, 3}
    for layer, transcoder in transcoders.items():
        for name, tensor in (await mesh.weights(transcoder.id)).items():
            assert torch.equal(tensor, expected[layer][name]), (layer, name)


async def events_of(mesh: Mesh, job_id: str) -> list[tuple[str, dict]]:
    found = await EventLog(mesh.context.database).after([f"training:{job_id}"], {})
    assert [event.sequence for event in found] == list(range(1, len(found) + 1))
    return [(event.event, event.data) for event in found]


async def test_a_dataset_becomes_transcoders_of_two_layers(mesh: Mesh) -> None:
    queued = await mesh.create()
    assert queued.status == pb.TRAINING_STATUS_QUEUED
    assert queued.id.startswith("job_")
    async with mesh.working():
        job = await mesh.reached(queued.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert job.status == pb.TRAINING_STATUS_COMPLETED, job
    assert (job.progress, job.step, job.tokens_seen, job.num_tokens) == (100, STEPS, STEPS * BATCH, STEPS * BATCH)
    assert (list(job.config.group_sizes), list(job.config.prefix_widths)) == ([16, 32, 64, 144], [16, 48, 112, 256])
    assert (job.config.source_site, job.config.target_site, job.config.aux_k) == ("mlp_in", "mlp_out", 32)
    assert [coder.layer for coder in job.coders] == [1, 3]
    assert job.fvu == pytest.approx(sum(coder.fvu for coder in job.coders) / 2)
    assert job.fvu_max == pytest.approx(job.fvu_per_prefix[0])
    assert job.cache_id.startswith("act_cache_")
    assert list(job.checkpoints) == []  # of no more use
    for layer, transcoder in (await made(mesh, job)).items():
        assert transcoder.id.startswith("tc_")
        assert (transcoder.d_in, transcoder.d_out, transcoder.dict_size) == (models.WIDTH, models.WIDTH, 256)
        assert (transcoder.model_id, transcoder.job_id) == (MODEL, job.id)
        assert transcoder.source_hook_point == f"blocks.{layer}.mlp.hook_in"
        assert transcoder.artifact_uri.startswith("artifact://transcoder/")
        assert transcoder.base_digest
        loaded = Transcoder.load(mesh.folder(transcoder.artifact_uri))
        assert loaded.info["base_digest"] == transcoder.base_digest
        assert loaded.info["train_fvu"] == transcoder.train_fvu
        assert loaded.shape.group_sizes == tuple(transcoder.group_sizes)
    await assert_undisturbed(mesh, job)

    names = [name for name, _ in await events_of(mesh, job.id)]
    assert names[:2] == ["training:queued", "training:started"]
    assert names[-1] == "training:completed"
    assert set(names[2:-1]) == {"training:progress"}
    facts = (await events_of(mesh, job.id))[-1][1]
    assert facts["transcoder_ids"] == list(job.transcoder_ids)
    told = [data for name, data in await events_of(mesh, job.id) if name == "training:progress"]
    assert told[-1]["fvu"] == pytest.approx(job.fvu)
    assert told[-1]["step"] == STEPS
    history = await mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id=job.id))
    assert [point.step for point in history.points] == [data["step"] for data in told]
    thinned = await mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id=job.id, points=1))
    assert [point.step for point in thinned.points] == [STEPS]
    value = mesh.context.metrics.get_sample_value
    assert (value("train_tokens_total"), value("train_nonfinite_total")) == (STEPS * BATCH, 0)
    assert value("train_coder_tokens_total") == 2 * STEPS * BATCH
    for name, figure in (("fvu", job.fvu), ("l0", job.l0), ("gradient_norm", job.gradient_norm)):
        assert value(f"train_{name}") == pytest.approx(figure)
    assert 0 < job.l0 <= 8
    assert [coder.l0_per_prefix[-1] for coder in job.coders] == [coder.l0 for coder in job.coders]
    assert job.gradient_norm == pytest.approx(sum(coder.gradient_norm for coder in job.coders) / 2)
    assert 0.3 < sum(coder.share for coder in job.coders) <= 1
    assert job.coder_tokens_per_second == pytest.approx(2 * job.tokens_per_second)
    assert [coder.name for coder in job.coders] == ["layer-1", "layer-3"]
    assert mesh.registry.ledger == {}
    assert mesh.registry.reserved[job.id] > 2 * 4 * 4 * 256 * 2 * models.WIDTH
    assert mesh.staged() == []


async def test_a_killed_process_is_started_again_from_its_checkpoint(mesh: Mesh, pids: list[int]) -> None:
    async with mesh.working():
        job = await mesh.create()
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        os.kill(pids[-1], signal.SIGKILL)
        job = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert job.status == pb.TRAINING_STATUS_COMPLETED, job
    assert len(set(pids)) == 2
    retry = next(data for name, data in await events_of(mesh, job.id) if name == "training:retrying")
    assert retry["error_code"] == "TRAINING_FAILED"
    assert retry["error_message"] == "the training process was ended by SIGKILL"
    await assert_undisturbed(mesh, job)


async def test_paused_resumed_and_the_same_bits(mesh: Mesh, pids: list[int]) -> None:
    async with mesh.working():
        job = await mesh.create(num_tokens=STEPS * BATCH)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        assert len(pids) == 2  # started and told to save
        await mesh.stub.PauseTrainingJob(pb.PauseTrainingJobRequest(id=job.id))
        paused = await mesh.reached(job.id, pb.TRAINING_STATUS_PAUSED)
        assert paused.checkpoints[-1].step >= 10
        assert len(paused.checkpoints) <= 3
        assert mesh.registry.ledger == {}
    async with mesh.working("w2"):
        resumed = await mesh.stub.ResumeTrainingJob(pb.ResumeTrainingJobRequest(id=job.id))
        assert resumed.status == pb.TRAINING_STATUS_QUEUED
        job = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert job.status == pb.TRAINING_STATUS_COMPLETED, job
    history = await mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id=job.id))
    steps = [point.step for point in history.points]
    assert steps == sorted(set(steps))
    await assert_undisturbed(mesh, job)


async def test_a_cancelled_training_is_finalised_from_a_checkpoint(mesh: Mesh) -> None:
    async with mesh.working():
        job = await mesh.create(num_tokens=200 * STEPS * BATCH)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        code, reason, _ = await refused(mesh.stub.FinalizeTrainingJob(pb.FinalizeTrainingJobRequest(id=job.id)))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
        await mesh.stub.CancelTrainingJob(pb.CancelTrainingJobRequest(id=job.id))
        cancelled = await mesh.reached(job.id, pb.TRAINING_STATUS_CANCELLED)
        kept = cancelled.checkpoints[-1]
        missing = pb.FinalizeTrainingJobRequest(id=job.id, checkpoint="ckpt_none")
        assert (await refused(mesh.stub.FinalizeTrainingJob(missing)))[0] == grpc.StatusCode.NOT_FOUND
        await mesh.stub.FinalizeTrainingJob(pb.FinalizeTrainingJobRequest(id=job.id, checkpoint=kept.id))
        done = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert done.status == pb.TRAINING_STATUS_COMPLETED, done
    for transcoder in (await made(mesh, done)).values():
        assert transcoder.tokens_seen == kept.tokens_seen < done.num_tokens
        assert 0 < transcoder.train_fvu < 2
        assert Transcoder.load(mesh.folder(transcoder.artifact_uri)).info["tokens_seen"] == kept.tokens_seen
