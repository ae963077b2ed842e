"""Transcoders and checkpoints of a training side by side on the same text; both sites in one job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1 import transcoders_pb2 as tpb

from services.kit.database import Database
from services.training.adapters.judged import ClaimedEvaluation
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET
from tests.wire.training_support import BATCH, HELD_OUT, STEPS, Mesh, meshing


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("LENSMESH_TRAINING_CHECKPOINT_TOKENS", str(2 * BATCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        text = [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(60)]
        mesh.registry.texts = {DATASET: text, HELD_OUT: text[:12]}
        yield mesh


async def test_checkpoints_are_compared_as_what_they_would_be_finalised_to_and_stay_until_they_were_judged(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {"source_site": "resid_mid", "variants": [{"source_site": "mlp_in"}]}
    async with mesh.working():
        job = await mesh.create(layers=[1], num_tokens=200 * STEPS * BATCH, **sites)
        await eventually(lambda: has_two(mesh, job.id), timeout=60)
        await mesh.stub.PauseTrainingJob(pb.PauseTrainingJobRequest(id=job.id))
        paused = await mesh.reached(job.id, pb.TRAINING_STATUS_PAUSED)
    await assert_wrong_ones_are_named(mesh, job.id)
    oldest, newest = paused.checkpoints[0].id, paused.checkpoints[-1].id
    wanted: dict[str, Any] = {"dataset_id": HELD_OUT, "num_batches": 2, "batch_size": 4}
    chosen = tpb.CompareTranscodersRequest(checkpoints=[{"job_id": job.id, "checkpoint": oldest}], **wanted)
    waiting = (await mesh.transcoders.CompareTranscoders(chosen)).compared
    prune = pb.PruneCheckpointsRequest(id=job.id, retention={"last": 1})
    assert {oldest, newest} == {one.id for one in (await mesh.stub.PruneCheckpoints(prune)).kept}

    async with mesh.working("w2"):
        early = await compared(mesh, **wanted, prefix=2, checkpoints=[{"job_id": job.id}])
        assert [(one.training_job_id, one.checkpoint, one.coder) for one in early] == [
            (job.id, newest, "layer-1"),
            (job.id, newest, "layer-1-variant-1"),
        ]
        assert all((one.transcoder_id, one.prefix, len(one.fvu_per_prefix)) == ("", 2, 2) for one in early)
        assert len(await ended(mesh, waiting)) == 2
        await eventually(lambda: nothing_waits(mesh, prune), timeout=60)
        assert [one.id for one in (await mesh.get(job.id)).checkpoints] == [newest]

        await mesh.stub.FinalizeTrainingJob(pb.FinalizeTrainingJobRequest(id=job.id, checkpoint=newest))
        done = await mesh.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
    with monkeypatch.context() as both:
        owners = meeting(both)
        async with mesh.working("host-1", slots=1), mesh.working("host-2", slots=1):
            finished = await compared(mesh, **wanted, prefix=2, transcoder_ids=done.transcoder_ids)
    assert sorted(owners) == ["host-1", "host-2"]
    for before, after in zip(early, finished, strict=True):
        assert (after.training_job_id, after.checkpoint, after.coder) == ("", "", "")
        for name in ("fvu", "l0", "ce_spliced", "ce_mean_ablated", "kl", "tokens"):
            assert getattr(before, name) == getattr(after, name), name
        assert list(before.fvu_per_prefix) == list(after.fvu_per_prefix)
    await assert_the_older_site_is_labelled(mesh, done)


def meeting(patch: pytest.MonkeyPatch) -> list[str]:
    """Who evaluates; no evaluation ends before two have begun."""
    owners: list[str] = []
    begin, begun = ClaimedEvaluation.begin, asyncio.Barrier(2)

    async def meet(self: ClaimedEvaluation) -> Any:
        owners.append(str(self._claim.job.owner))
        await begun.wait()
        return await begin(self)

    patch.setattr(ClaimedEvaluation, "begin", meet)
    return owners


async def assert_the_older_site_is_labelled(mesh: Mesh, job: pb.TrainingJob) -> None:
    assert (job.config.source_site, job.config.legacy) == ("resid_mid", True)
    assert [(one.source_site, one.legacy) for one in job.variants] == [("mlp_in", False)]
    legacy, current = [await mesh.transcoder(one) for one in job.transcoder_ids]
    assert (legacy.source_hook_point, legacy.legacy_source) == ("blocks.1.hook_resid_mid", True)
    assert (current.source_hook_point, current.legacy_source) == ("blocks.1.mlp.hook_in", False)
    assert legacy.target_hook_point == current.target_hook_point == "blocks.1.hook_mlp_out"


async def assert_wrong_ones_are_named(mesh: Mesh, job_id: str) -> None:
    for fields, field in (
        ({"checkpoints": [{"job_id": job_id, "coder": "layer-1"}]}, "transcoder_ids"),
        ({"checkpoints": [{"job_id": job_id, "coder": "layer-2"}]}, "checkpoints[0].coder"),
        ({"checkpoints": [{"job_id": job_id}], "prefix": 5}, "prefix"),
    ):
        code, fields_named = await refused(mesh, dataset_id=HELD_OUT, **fields)
        assert (code, fields_named) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    missing = {"checkpoints": [{"job_id": job_id, "checkpoint": "ckpt_none"}]}
    assert (await refused(mesh, dataset_id=HELD_OUT, **missing))[0] == grpc.StatusCode.NOT_FOUND


async def has_two(mesh: Mesh, job_id: str) -> bool:
    return len((await mesh.get(job_id)).checkpoints) >= 2


async def nothing_waits(mesh: Mesh, prune: pb.PruneCheckpointsRequest) -> bool:
    return len((await mesh.stub.PruneCheckpoints(prune)).kept) == 1


async def compared(mesh: Mesh, **fields: Any) -> list[pb.Evaluation]:
    return await ended(
        mesh, (await mesh.transcoders.CompareTranscoders(tpb.CompareTranscodersRequest(**fields))).compared
    )


async def ended(mesh: Mesh, queued: Sequence[Any]) -> list[pb.Evaluation]:
    ids = tpb.GetEvaluationsRequest(ids=[one.evaluation_id for one in queued])

    async def all_ended() -> Any:
        found = (await mesh.transcoders.GetEvaluations(ids)).evaluations
        return list(found) if len(found) == len(queued) else None

    return await eventually(all_ended, timeout=60)


async def refused(mesh: Mesh, **fields: Any) -> tuple[grpc.StatusCode, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.transcoders.CompareTranscoders(tpb.CompareTranscodersRequest(**fields))
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        detail.Unpack(bad)
    return caught.value.code(), [violation.field for violation in bad.field_violations]
