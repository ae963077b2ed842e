"""What TrainingService refuses and answers without training, and what is done with trained transcoders."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import groups_pb2
from lensmesh.training.v1 import training_pb2 as pb

from services.kit.database import Database
from services.residency.families import family_of
from services.residency.hooks import capture_hooks
from services.residency.lenses.transcoder import Transcoder
from services.training.compute import compute_fvu
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL
from tests.wire.training_support import BATCH, HELD_OUT, Mesh, meshing


def texts(count: int, first: int = 0) -> list[str]:
    return [f"{models.TEXTS[n % 5]} {n} " * (1 + n % 3) for n in range(first, first + count)]


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60), HELD_OUT: texts(24, 1000), "ds_tiny": ["one two"], "ds_empty": [""]}
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


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("layers", {"layers": [4]}),
        ("layers", {"layers": []}),
        ("source", {"source": None}),
        ("source", {"source": {}}),
        ("group_sizes", {"group_sizes": [128, 64]}),
        ("prefix_widths", {"prefix_widths": [128, 64, 256]}),
        ("prefix_widths", {"prefix_widths": [128, 256], "group_sizes": [128, 128]}),
        ("top_k", {"top_k": 257}),
        ("top_k", {"top_k": 0}),
        ("num_tokens", {"num_tokens": BATCH - 1}),
        ("batch_size", {"devices": 3}),
        ("devices", {"devices": -1}),
        ("learning_rate", {"learning_rate": 2.0}),
        ("dtype", {"dtype": types_pb2.DTYPE_FLOAT16}),
        ("source_site", {"source_site": "resid_post"}),
        ("apply_rmsnorm_scaling", {"apply_rmsnorm_scaling": True}),
        ("apply_rmsnorm_scaling", {"source_site": "ln2_normalized"}),
        ("variants[0].top_k", {"variants": [{"top_k": 300}]}),
        ("variants[0].batch_size", {"variants": [{"batch_size": 32}]}),
        ("variants[1].prefix_widths", {"variants": [{}, {"dict_size": 512, "prefix_widths": [8]}]}),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_started(mesh: Mesh, field: str, changes: dict[str, Any]) -> None:
    assert await refused(mesh.create(**changes)) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR", [field])
    assert (await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest())).total == 0


async def test_what_does_not_exist_or_cannot_be_done_is_refused(mesh: Mesh) -> None:
    not_found = grpc.StatusCode.NOT_FOUND
    assert (await refused(mesh.create(model_id="m_none")))[:2] == (not_found, "MODEL_NOT_FOUND")
    assert (await refused(mesh.create(source={"dataset_id": "ds_none"})))[0] == not_found
    assert (await refused(mesh.create(source={"cache_id": "act_cache_none"})))[0] == not_found
    for call in (
        mesh.get("job_none"),
        mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id="job_none")),
        mesh.stub.CancelTrainingJob(pb.CancelTrainingJobRequest(id="job_none")),
        mesh.stub.PauseTrainingJob(pb.PauseTrainingJobRequest(id="job_none")),
        mesh.stub.FinalizeTrainingJob(pb.FinalizeTrainingJobRequest(id="job_none")),
        mesh.transcoder("tc_none"),
        mesh.stub.EncodeText(pb.EncodeTextRequest(id="tc_none", text="x")),
        mesh.stub.EvaluateTranscoder(pb.EvaluateTranscoderRequest(id="tc_none", dataset_id=HELD_OUT)),
        mesh.stub.ListEvaluations(pb.ListEvaluationsRequest(id="tc_none")),
        mesh.stub.DeleteTranscoder(pb.DeleteTranscoderRequest(id="tc_none")),
    ):
        assert (await refused(call))[0] == not_found


async def test_a_plan_says_what_it_would_take_and_changes_nothing(mesh: Mesh) -> None:
    plan = await mesh.create(validate_only=True, dict_size=None, top_k=None, num_tokens=None)
    assert (plan.id, plan.status) == ("", pb.TRAINING_STATUS_UNSPECIFIED)
    config = plan.config
    assert (config.dict_size, config.top_k) == (16 * models.WIDTH, 32)
    assert list(config.group_sizes) == [models.WIDTH * factor for factor in (1, 2, 4, 9)]
    assert not config.HasField("learning_rate")  # its rule needs the number of tokens
    short = await mesh.create(validate_only=True, dict_size=None, top_k=None, num_tokens=4096)
    assert short.config.learning_rate == pytest.approx(5e-3 * 2)
    two_coders_with_gradients_and_moments = 2 * 4 * 4 * config.dict_size * 2 * models.WIDTH
    assert plan.estimated_memory_bytes > two_coders_with_gradients_and_moments
    larger = await mesh.create(validate_only=True, dict_size=4 * config.dict_size)
    assert larger.estimated_memory_bytes > 3 * two_coders_with_gradients_and_moments
    assert (await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest())).total == 0


async def test_a_request_is_answered_once_and_listed(mesh: Mesh) -> None:
    first = await mesh.create(request_id="r1")
    assert (await mesh.create(request_id="r1")).id == first.id
    code, reason, _ = await refused(mesh.create(request_id="r1", top_k=9))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_ID_REUSED")
    others = [(await mesh.create()).id for _ in range(2)]
    await mesh.stub.CancelTrainingJob(pb.CancelTrainingJobRequest(id=others[0]))
    page = await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(limit=2))
    assert ([job.id for job in page.training_jobs], page.total) == ([*reversed(others)], 3)
    rest = await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(limit=2, page_token=page.next_page_token))
    assert ([job.id for job in rest.training_jobs], rest.next_page_token) == ([first.id], "")
    cancelled = pb.ListTrainingJobsRequest(status=pb.TRAINING_STATUS_CANCELLED)
    assert [job.id for job in (await mesh.stub.ListTrainingJobs(cancelled)).training_jobs] == [others[0]]
    assert (await mesh.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(model_id="m_other"))).total == 0


async def test_data_that_does_not_fit_fails_the_job_with_its_reason(mesh: Mesh) -> None:
    few = await mesh.create(source={"dataset_id": "ds_tiny"})
    empty = await mesh.create(source={"dataset_id": "ds_empty"})
    async with mesh.working():
        few = await mesh.reached(few.id, pb.TRAINING_STATUS_FAILED)
        empty = await mesh.reached(empty.id, pb.TRAINING_STATUS_FAILED)
    assert few.error_code == "VALIDATION_ERROR"
    assert few.error_message.startswith("batch_size: 64 is more than the cache's ")
    assert empty.error_code == "DATASET_UNUSABLE"


async def test_a_cache_is_checked_before_anything_is_queued_and_memory_before_it_is_used(mesh: Mesh) -> None:
    async with mesh.working():
        cache_id = (await mesh.cache()).cache_id
        source = {"cache_id": cache_id}
        assert (await refused(mesh.create(source=source, layers=[2])))[2] == ["source.cache_id"]
        assert (await refused(mesh.create(source=source, batch_size=100_000, num_tokens=None)))[2] == ["batch_size"]
        mesh.registry.budget = 1000
        job = await mesh.create(source=source)
        job = await mesh.reached(job.id, pb.TRAINING_STATUS_FAILED, pb.TRAINING_STATUS_COMPLETED)
    assert (job.status, job.error_code) == (pb.TRAINING_STATUS_FAILED, "INSUFFICIENT_MEMORY")


async def test_a_transcoder_is_evaluated_read_and_deleted(mesh: Mesh) -> None:
    job = await mesh.trained(layers=[3], variants=[{"top_k": 4}])
    listed = await mesh.stub.ListTranscoders(pb.ListTranscodersRequest(model_id=MODEL, layer=3))
    assert {one.id for one in listed.transcoders} == set(job.transcoder_ids)
    assert sorted(one.top_k for one in listed.transcoders) == [4, 8]
    assert (await mesh.stub.ListTranscoders(pb.ListTranscodersRequest(layer=0))).total == 0
    transcoder = next(one for one in listed.transcoders if one.top_k == 8)

    wanted = pb.EvaluateTranscoderRequest(
        id=transcoder.id, dataset_id=HELD_OUT, num_batches=3, batch_size=4, request_id="e1"
    )
    assert (await refused(_evaluate(mesh, wanted, prefix=5)))[2] == ["prefix"]
    queued = await mesh.stub.EvaluateTranscoder(wanted)
    assert (await mesh.stub.EvaluateTranscoder(wanted)).job_id == queued.job_id
    asked = pb.ListEvaluationsRequest(id=transcoder.id)
    assert (await mesh.stub.ListEvaluations(asked)).total == 0
    async with mesh.working():
        found = await eventually(lambda: _first(mesh, asked), timeout=60)
        broken = await _evaluate(mesh, wanted, dataset_id="ds_empty", request_id="")
        failed = await eventually(lambda: _ended(mesh, broken.job_id), timeout=60)
    assert (failed.state, failed.error_code) == ("failed", "DATASET_UNUSABLE")
    assert (found.id, found.job_id) == (queued.resource_id, queued.job_id)
    loaded = Transcoder.load(mesh.folder(transcoder.artifact_uri))
    assert found.fvu == pytest.approx(_fvu(mesh.registry.texts[HELD_OUT][:12], loaded), rel=1e-4)
    assert (len(found.fvu_per_prefix), found.prefix, found.batches) == (4, 4, 3)
    assert found.fvu == found.fvu_per_prefix[-1]
    assert found.fvu_max == max(found.fvu_per_prefix)
    assert found.fvu_mean == pytest.approx(sum(found.fvu_per_prefix) / 4)
    assert found.mode == pb.EVALUATION_MODE_FULL
    assert 0 < found.l0 <= 8
    assert found.ce_clean > 0
    assert found.kl >= 0
    assert found.ce_recovered == pytest.approx(
        (found.ce_zero_ablated - found.ce_spliced) / (found.ce_zero_ablated - found.ce_clean)
    )

    reading = await mesh.stub.EncodeText(pb.EncodeTextRequest(id=transcoder.id, text="def add(left", top_k=3))
    ids = models.tokenizer()("def add(left")["input_ids"]
    assert [token.token_id for token in reading.tokens] == ids
    assert all(1 <= len(token.features) <= 3 for token in reading.tokens)
    code, _, fields = await refused(mesh.stub.EncodeText(pb.EncodeTextRequest(id=transcoder.id, text="x", prefix=5)))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["prefix"])

    lens = groups_pb2.Lens(id="lens_1", transcoder_id=transcoder.id)
    mesh.registry.groups = [groups_pb2.Group(id="grp_1", lenses=[lens])]
    delete = pb.DeleteTranscoderRequest(id=transcoder.id)
    assert (await refused(mesh.stub.DeleteTranscoder(delete)))[1] == "IN_USE"
    mesh.registry.groups = []
    folder = mesh.folder(transcoder.artifact_uri)
    await mesh.stub.DeleteTranscoder(delete)
    assert not folder.exists()
    assert (await mesh.stub.ListTranscoders(pb.ListTranscodersRequest())).total == 1
    assert (await refused(mesh.stub.ListEvaluations(asked)))[0] == grpc.StatusCode.NOT_FOUND


async def _evaluate(mesh: Mesh, wanted: pb.EvaluateTranscoderRequest, **changes: Any) -> pb.QueuedJob:
    request = pb.EvaluateTranscoderRequest()
    request.CopyFrom(wanted)
    for name, value in changes.items():
        setattr(request, name, value)
    return await mesh.stub.EvaluateTranscoder(request)


async def _first(mesh: Mesh, asked: pb.ListEvaluationsRequest) -> pb.Evaluation | None:
    return next(iter((await mesh.stub.ListEvaluations(asked)).evaluations), None)


async def _ended(mesh: Mesh, job_id: str) -> Any:
    job = await mesh.context.jobs.get(job_id)
    return job if job.ended else None


def _fvu(held_out: list[str], transcoder: Transcoder) -> float:
    """FVU over these texts, one at a time, from the model's own modules."""
    model, tokenizer, pairs = models.tiny("gpt2"), models.tokenizer(), []
    points = ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    for text in held_out:
        ids = torch.tensor([tokenizer(text)["input_ids"][: models.CONTEXT]])
        with capture_hooks(model, family_of(model), points) as capture:
            found = capture.run(ids)
        pairs.append((found[points[0]][0], found[points[1]][0]))
    x, y = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    return compute_fvu(y, transcoder(x))
