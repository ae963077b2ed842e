"""What a stopped or failed training leaves: its checkpoints by policy, its transcoders, its configuration."""

from __future__ import annotations

import resource
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
from lensmesh.training.v1 import training_pb2 as pb
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.kit.database import Database
from services.kit.events import EventLog
from services.residency.shards import MANIFEST, Manifest, file_digest
from services.training.cache_rows import CacheRows
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET
from tests.wire.training_support import BATCH, STEPS, Mesh, meshing

POINTS = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(2 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(60)]}
        yield mesh


async def finalised(mesh: Mesh, job_id: str, checkpoint: pb.Checkpoint) -> None:
    await mesh.stub.FinalizeTrainingJob(pb.FinalizeTrainingJobRequest(id=job_id, checkpoint=checkpoint.id))
    done = await mesh.reached(job_id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    assert done.status == pb.TRAINING_STATUS_COMPLETED, done
    made = await mesh.transcoder(done.transcoder_ids[0])
    assert made.tokens_seen == checkpoint.tokens_seen < done.num_tokens


async def test_out_of_memory_says_so_frees_the_ledger_and_leaves_checkpoints_to_finalise(
    mesh: Mesh, pids: list[int]
) -> None:
    wanted = {"layers": [1], "dict_size": 4096, "batch_size": 512, "num_tokens": 60 * 512}
    async with mesh.working():
        job = await mesh.create(**wanted)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        child = psutil.Process(pids[-1])
        child.rlimit(resource.RLIMIT_AS, (child.memory_info().vms, child.memory_info().vms))
        child.resume()
        failed = await mesh.reached(job.id, pb.TRAINING_STATUS_FAILED, pb.TRAINING_STATUS_COMPLETED)
        assert (failed.error_code, failed.error_message) == ("DEVICE_OOM", "the device ran out of memory")
        assert mesh.registry.ledger == {}
        assert mesh.registry.reserved[job.id] > 4 * 4 * 4096 * 2 * models.WIDTH
        await finalised(mesh, job.id, failed.checkpoints[0])


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Change tensors of a cache's first shard as if they had been extracted so; the shard's name."""
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    shard = manifest.shards[0]
    tensors = load_file(folder / shard.name)
    change(tensors)
    save_file(tensors, folder / shard.name)
    digest, size = file_digest(folder / shard.name), (folder / shard.name).stat().st_size
    shards = (replace(shard, digest=digest, size_bytes=size), *manifest.shards[1:])
    (folder / MANIFEST).write_text(replace(manifest, shards=shards).to_json())
    return shard.name


def break_row_5(tensors: dict[str, Tensor]) -> None:
    tensors[POINTS[1]][5, 3] = float("inf")


def halve_targets(tensors: dict[str, Tensor]) -> None:
    tensors[POINTS[1]] = tensors[POINTS[1]].half()


async def test_mixed_dtypes_and_the_cache_of_another_model_are_refused_by_name(mesh: Mesh) -> None:
    async with mesh.working():
        cache_id = (await mesh.cache()).cache_id
    folder = await mesh.cache_folder(cache_id)
    queued = await mesh.create(layers=[1], source={"cache_id": cache_id})
    rewrite(folder, halve_targets)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.create(layers=[1], source={"cache_id": cache_id})
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    said = "source.cache_id: the cache mixes F16, F32"
    assert caught.value.details() == said
    listed = await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest())
    assert [one.id for one in listed.training_jobs] == [queued.id]
    # where the request was answered on a host without the files, the job says so before it reserves anything
    async with mesh.working("w2"):
        failed = await mesh.reached(queued.id, pb.TRAINING_STATUS_FAILED, pb.TRAINING_STATUS_COMPLETED)
    assert (failed.error_code, failed.error_message) == ("VALIDATION_ERROR", said)
    assert (mesh.registry.reserved, mesh.registry.ledger) == ({}, {})
    async with mesh.context.database.connection() as conn:
        await conn.execute(
            "UPDATE activation_cache SET model_id = 'm_other',"
            """ manifest = jsonb_set(manifest, '{model,digest}', '"other"')"""
        )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.create(layers=[1], source={"cache_id": cache_id})
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "source.cache_id: the cache is of model m_other"


async def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint_and_names_the_row(mesh: Mesh) -> None:
    async with mesh.working():
        cache_id = (await mesh.cache()).cache_id
        folder = await mesh.cache_folder(cache_id)
        wanted = {"layers": [1], "source": {"cache_id": cache_id}, "num_tokens": 200 * STEPS * BATCH}
        job = await mesh.create(**wanted)
        await eventually(lambda: mesh.has_checkpoint(job.id), timeout=60)
        await mesh.stub.PauseTrainingJob(pb.PauseTrainingJobRequest(id=job.id))
        paused = await mesh.reached(job.id, pb.TRAINING_STATUS_PAUSED)
        shard = rewrite(folder, break_row_5)
        await mesh.stub.ResumeTrainingJob(pb.ResumeTrainingJobRequest(id=job.id))
        failed = await mesh.reached(job.id, pb.TRAINING_STATUS_FAILED, pb.TRAINING_STATUS_COMPLETED)
        assert failed.error_code == "NON_FINITE_LOSS"
        assert mesh.registry.ledger == {}
        last = failed.checkpoints[-1]
        assert last.step >= paused.checkpoints[-1].step
        found = await EventLog(mesh.context.database).after([f"training:{job.id}"], {})
        facts = found[-1].data["details"]
        assert (found[-1].event, facts["shard"], int(facts["shard_row"])) == ("training:failed", shard, 5)
        assert (int(facts["rows"]), int(facts["non_finite_x"]), int(facts["non_finite_y"])) == (BATCH, 0, 1)
        rows = CacheRows(folder, {"pair": POINTS})
        x, _ = next(rows.batches(BATCH, 0, int(facts["position"])))["pair"]
        assert int(facts["position"]) == BATCH * int(facts["step"]) >= last.tokens_seen
        assert (float(facts["min_x"]), float(facts["max_x"])) == (x.min(), x.max())


async def test_a_paused_training_is_pruned_as_its_preview_said_and_finalised(mesh: Mesh) -> None:
    retention = {"last": 1, "best": 0, "every_tokens": 4 * BATCH}
    async with mesh.working():
        job = await mesh.create(layers=[1], num_tokens=200 * STEPS * BATCH, retention=retention)
        assert job.retention == pb.CheckpointRetention(**retention)

        async def several() -> bool:
            return len((await mesh.get(job.id)).checkpoints) >= 4

        await eventually(several, timeout=60)
        await mesh.stub.PauseTrainingJob(pb.PauseTrainingJobRequest(id=job.id))
        paused = await mesh.reached(job.id, pb.TRAINING_STATUS_PAUSED)
        windows = [one.tokens_seen // (4 * BATCH) for one in paused.checkpoints[:-1]]
        assert len(windows) == len(set(windows)) >= 3  # one of every four batches' tokens, and the newest

        own = await mesh.stub.PruneCheckpoints(pb.PruneCheckpointsRequest(id=job.id, validate_only=True))
        assert (list(own.kept), list(own.deleted), own.freed_bytes) == (list(paused.checkpoints), [], 0)
        policy = pb.CheckpointRetention(last=1, best=1)
        asked = pb.PruneCheckpointsRequest(id=job.id, retention=policy, validate_only=True)
        preview = await mesh.stub.PruneCheckpoints(asked)
        newest = paused.checkpoints[-1]
        best = min(paused.checkpoints, key=lambda one: (one.fvu, -one.step))
        assert {one.id for one in preview.kept} == {newest.id, best.id}
        assert preview.freed_bytes == sum(one.size_bytes for one in preview.deleted) > 0
        assert (await mesh.get(job.id)).checkpoints == paused.checkpoints
        folders = len(list((mesh.context.artifacts.root / "checkpoint").iterdir()))
        asked.validate_only = False
        assert await mesh.stub.PruneCheckpoints(asked) == preview
        assert (await mesh.get(job.id)).checkpoints == preview.kept
        assert len(list((mesh.context.artifacts.root / "checkpoint").iterdir())) == folders - len(preview.deleted)
        await finalised(mesh, job.id, preview.kept[0])


async def test_a_configuration_is_exported_imported_and_cloned(mesh: Mesh) -> None:
    job = await mesh.create(
        source_site="resid_mid",
        activation=pb.ACTIVATION_BATCH_TOPK,
        group_sizes=[64, 192],
        prefix_weights=[3.0, 1.0],
        aux_k=0,
        learning_rate=1e-3,
        lr_schedule=pb.LR_SCHEDULE_COSINE,
        seed=7,
        devices=2,
        tracker="wandb",
        variants=[{"source_site": "mlp_in", "top_k": 4, "skip": True}],
        retention={"last": 2, "best": 2, "every_tokens": 100},
    )
    assert (job.config.legacy, [one.legacy for one in job.variants]) == (True, [False])
    config = await mesh.stub.GetTrainingConfig(pb.GetTrainingConfigRequest(id=job.id))
    assert config.tracker == "wandb"
    imported = await mesh.stub.CreateTrainingJob(config)
    cloned = await mesh.stub.CloneTrainingJob(pb.CloneTrainingJobRequest(id=job.id, request_id="c1"))
    again = await mesh.stub.CloneTrainingJob(pb.CloneTrainingJobRequest(id=job.id, request_id="c1"))
    preview = await mesh.stub.CloneTrainingJob(pb.CloneTrainingJobRequest(id=job.id, validate_only=True))
    assert again == cloned
    assert len({job.id, imported.id, cloned.id}) == 3
    assert preview.id == ""
    for one in (imported, cloned, preview):
        for name in ("config", "variants", "layers", "devices", "retention", "num_tokens"):
            assert getattr(one, name) == getattr(job, name), name
    assert await mesh.stub.GetTrainingConfig(pb.GetTrainingConfigRequest(id=cloned.id)) == config
    found = await EventLog(mesh.context.database).after([f"training:{cloned.id}"], {})
    assert [event.event for event in found] == ["training:queued"]
