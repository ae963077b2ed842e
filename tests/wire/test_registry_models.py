"""The catalogue of models over gRPC: what is created, listed, changed and deleted, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.extensions.v1 import extensions_pb2
from lensmesh.registry.v1 import groups_pb2, models_pb2_grpc
from lensmesh.registry.v1 import models_pb2 as pb
from lensmesh.training.v1 import training_pb2

from services.kit import errors
from services.kit.database import Database
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


@pytest.fixture
async def host(mesh: Mesh) -> FakeHost:
    return await mesh.add_host(FakeHost(sizes={"tiny": 100 * MB, "org/dotted-v0.1": 200 * MB}))


async def test_creation_reads_config_sizes_defaults_and_digest_from_a_host(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create("org/dotted-v0.1", name="A model", quantization=types.QUANTIZATION_INT8)
    assert model.id.startswith("m_dotted_v0_1_")
    assert (model.status, model.progress, model.model_type) == (pb.MODEL_STATUS_PENDING, 0, "gpt2")
    assert (model.parameter_count, model.hidden_size, model.num_layers) == (50 * MB, 64, 4)
    assert (model.vocab_size, model.context_length, model.digest) == (1000, 128, "digest-org/dotted-v0.1")
    assert model.config["hidden_size"] == 64
    assert model.architecture == "GPT2LMHeadModel"
    assert list(model.defaults.group_sizes) == [512, 512]
    assert {point.site: point.name for point in model.defaults.hook_points} == {"mlp_in": "blocks.{layer}.mlp.hook_in"}
    assert model.defaults.experimental
    assert model.defaults.dtype == types.DTYPE_FLOAT32
    assert model.estimated_memory_bytes == 110 * MB
    assert model.estimated_load_seconds == pytest.approx(0.5)  # 100 MB at the assumed 200 MB/s
    assert model.created_by == "ada"
    assert not model.HasField("memory_usage_bytes")
    assert model == await mesh.get(model.id)


@pytest.mark.parametrize(
    ("identifier", "source"),
    [
        ("../secret", types.MODEL_SOURCE_LOCAL),
        ("a/../../b", types.MODEL_SOURCE_LOCAL),
        ("/etc/passwd", types.MODEL_SOURCE_LOCAL),
        ("a//b", types.MODEL_SOURCE_LOCAL),
        ("a/./b", types.MODEL_SOURCE_LOCAL),
        ("a\0b", types.MODEL_SOURCE_LOCAL),
        ("a\\b", types.MODEL_SOURCE_LOCAL),
        ("a%2e%2e", types.MODEL_SOURCE_LOCAL),
        ("a" * 501, types.MODEL_SOURCE_LOCAL),
        ("owner/name/more", types.MODEL_SOURCE_HUGGINGFACE),
    ],
)
async def test_an_identifier_that_could_leave_its_root_is_refused_before_a_host_hears_of_it(
    mesh: Mesh, host: FakeHost, identifier: str, source: int
) -> None:
    failure = await refused(mesh.create(identifier, name="x", source=source))
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", "VALIDATION_ERROR")
    assert failure.fields == ["model_identifier"]
    assert host.asked == []


async def test_a_model_type_that_contradicts_the_config_is_refused(mesh: Mesh, host: FakeHost) -> None:
    failure = await refused(mesh.create("tiny", model_type="llama"))
    assert (failure.fields, failure.facts["config_model_type"]) == (["model_type"], "gpt2")
    listed = await mesh.models.ListModels(pb.ListModelsRequest())
    assert listed.total == 0


async def test_a_hub_that_does_not_answer_leaves_the_model_pending_and_its_load_fills_the_sizes(
    mesh: Mesh, host: FakeHost
) -> None:
    host.hub_down = True
    model = await mesh.create("tiny", source=types.MODEL_SOURCE_HUGGINGFACE)
    assert (model.status, model.HasField("hidden_size")) == (pb.MODEL_STATUS_PENDING, False)
    assert (await refused(mesh.load(model.id))).code == "UNAVAILABLE"
    host.hub_down = False
    await mesh.load(model.id)
    loaded = await mesh.reaches(model.id, pb.MODEL_STATUS_READY)
    assert (loaded.hidden_size, loaded.model_type, loaded.digest) == (64, "gpt2", "digest-tiny")


async def test_what_is_to_be_loaded_at_creation_is_loaded_once_the_hub_answers_unless_it_is_taken_back(
    mesh: Mesh, host: FakeHost
) -> None:
    host.hub_down = True
    waits = {"source": types.MODEL_SOURCE_HUGGINGFACE, "auto_load": True}
    wanted, taken_back = await mesh.create("tiny", **waits), await mesh.create("tiny", **waits)
    assert (await mesh.models.UnloadModel(pb.UnloadModelRequest(id=taken_back.id))).status == pb.MODEL_STATUS_PENDING
    host.hub_down = False
    await mesh.reaches(wanted.id, pb.MODEL_STATUS_READY)
    assert [request.model_id for request in host.names("Load")] == [wanted.id]


async def test_the_same_request_id_gives_the_same_model_and_another_body_is_refused(mesh: Mesh, host: FakeHost) -> None:
    first = await mesh.create(request_id="r1")
    assert (await mesh.create(request_id="r1")).id == first.id
    assert (await refused(mesh.create(request_id="r1", name="other"))).reason == "REQUEST_ID_REUSED"
    assert (await mesh.models.ListModels(pb.ListModelsRequest())).total == 1
    other_user = models_pb2_grpc.ModelServiceStub(mesh.as_user("bob"))
    theirs = await other_user.CreateModel(
        pb.CreateModelRequest(name="tiny", source=types.MODEL_SOURCE_LOCAL, model_identifier="tiny", request_id="r1")
    )
    assert theirs.id != first.id


async def test_validate_only_gives_facts_and_plan_and_creates_nothing(mesh: Mesh, host: FakeHost) -> None:
    draft = await mesh.create(validate_only=True)
    assert (draft.id, draft.hidden_size, draft.status) == ("", 64, pb.MODEL_STATUS_PENDING)
    assert draft.plan.required_memory_bytes == 110 * MB
    assert draft.plan.breakdown.weights == 100 * MB
    assert [(p.device, p.fits) for p in draft.plan.placements] == [("device-0/cpu", True)]
    assert (await mesh.models.ListModels(pb.ListModelsRequest())).total == 0


async def test_lists_filter_page_by_offset_and_by_token_and_mask_fields(mesh: Mesh, host: FakeHost) -> None:
    ids = [(await mesh.create("tiny", name=f"n{n}")).id for n in range(5)][::-1]
    first = await mesh.models.ListModels(pb.ListModelsRequest(limit=2))
    assert ([m.id for m in first.models], first.total, first.limit) == (ids[:2], 5, 2)
    await mesh.create("tiny", name="newer")  # keyset paging does not shift when something new comes
    second = await mesh.models.ListModels(pb.ListModelsRequest(limit=2, page_token=first.next_page_token))
    third = await mesh.models.ListModels(pb.ListModelsRequest(limit=2, page_token=second.next_page_token))
    assert [m.id for m in [*second.models, *third.models]] == ids[2:]
    assert third.next_page_token == ""
    by_offset = await mesh.models.ListModels(pb.ListModelsRequest(limit=2, offset=5))
    assert [m.id for m in by_offset.models] == ids[4:]
    full = await mesh.models.ListModels(pb.ListModelsRequest(limit=6))
    assert (len(full.models), full.next_page_token) == (6, "")
    assert (await mesh.models.ListModels(pb.ListModelsRequest(status=pb.MODEL_STATUS_READY))).total == 0
    assert (await mesh.models.ListModels(pb.ListModelsRequest(model_type="llama"))).total == 0
    masked = await mesh.models.ListModels(pb.ListModelsRequest(limit=1, read_mask={"paths": ["id", "name"]}))
    assert masked.models[0] == pb.Model(id=masked.models[0].id, name="newer")
    bad_mask = mesh.models.ListModels(pb.ListModelsRequest(read_mask={"paths": ["secret"]}))
    assert (await refused(bad_mask)).fields == ["read_mask"]
    bad_token = mesh.models.ListModels(pb.ListModelsRequest(page_token="bm9wZQ=="))
    assert (await refused(bad_token)).fields == ["page_token"]


async def test_updates_need_the_current_etag_and_a_ready_models_quantization_stays(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    changed = await mesh.models.UpdateModel(
        pb.UpdateModelRequest(id=model.id, name="new", pinned=True, etag=model.etag)
    )
    assert (changed.name, changed.pinned, changed.preload) == ("new", True, False)
    assert changed.etag != model.etag
    stale = await refused(mesh.models.UpdateModel(pb.UpdateModelRequest(id=model.id, name="x", etag=model.etag)))
    assert (stale.code, stale.reason, stale.facts["etag"]) == ("ABORTED", "STALE_ETAG", changed.etag)
    await mesh.load(model.id)
    await mesh.reaches(model.id, pb.MODEL_STATUS_READY)
    request = pb.UpdateModelRequest(id=model.id, quantization=types.QUANTIZATION_INT8)
    assert (await refused(mesh.models.UpdateModel(request))).reason == "WRONG_STATE"
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    changed = await mesh.models.UpdateModel(request)
    assert (changed.quantization, changed.estimated_memory_bytes) == (types.QUANTIZATION_INT8, 60 * MB)


async def test_a_model_in_use_is_deleted_with_its_users_only_by_an_admin(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.transcoders["tc_1"] = training_pb2.Transcoder(id="tc_1", model_id=model.id)
    failure = await refused(mesh.models.DeleteModel(pb.DeleteModelRequest(id=model.id)))
    assert (failure.reason, failure.facts["users"]) == ("IN_USE", "transcoder tc_1")
    cascade = pb.DeleteModelRequest(id=model.id, cascade=True)
    assert (await refused(mesh.models.DeleteModel(cascade))).reason == "SCOPE_MISSING"
    admin: Any = models_pb2_grpc.ModelServiceStub(mesh.as_user("root", "model:write", "model:admin"))
    await admin.DeleteModel(cascade)
    assert (await refused(mesh.get(model.id))).reason == "MODEL_NOT_FOUND"
    assert (host.transcoders, host.held) == ({}, {})
    assert await mesh.ledger() == (0, 0)


async def test_a_model_goes_with_its_extensions_and_the_lenses_made_of_them(mesh: Mesh, host: FakeHost) -> None:
    """As the extension service does it: what a lens uses is not deleted, and its row refers to the model's."""
    model = await mesh.ready()
    host.extensions["x_1"] = extensions_pb2.Extension(
        id="x_1", model_id=model.id, artifact_uri="artifact://extension/x_1", base_digest="digest-tiny", size_bytes=MB
    )
    pool = mesh.database.pool
    await pool.execute(
        "INSERT INTO extensions (id, model_id, task_name, kind, parameter_counts, base_digest, created_by)"
        " VALUES ('x_1', $1, 'python', 'lora', '{}', 'digest-tiny', 'ada')",
        model.id,
    )

    async def delete(extension_id: str) -> None:
        if await pool.fetchval("SELECT count(*) FROM lenses WHERE extension_id = $1", extension_id):
            raise errors.Conflict("lenses use it", reason="IN_USE")
        await pool.execute("DELETE FROM extensions WHERE id = $1", extension_id)

    host.before_delete = delete
    group = await mesh.groups.CreateGroup(groups_pb2.CreateGroupRequest(name="g", model_id=model.id))
    lens = groups_pb2.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_EXTENSION, extension_id="x_1")
    await mesh.groups.AttachLens(lens)
    failure = await refused(mesh.models.DeleteModel(pb.DeleteModelRequest(id=model.id)))
    assert (failure.reason, failure.facts["users"]) == ("IN_USE", f"group {group.id}, extension x_1")
    admin: Any = models_pb2_grpc.ModelServiceStub(mesh.as_user("root", "model:write", "model:admin"))
    await admin.DeleteModel(pb.DeleteModelRequest(id=model.id, cascade=True))
    assert (await refused(mesh.get(model.id))).reason == "MODEL_NOT_FOUND"
    assert host.extensions == {}
    assert await pool.fetchval("SELECT (SELECT count(*) FROM extensions) + (SELECT count(*) FROM groups)") == 0
    assert await mesh.ledger() == (0, 0)


async def test_the_hosts_disks_forget_a_deleted_model_unless_another_has_its_files(mesh: Mesh, host: FakeHost) -> None:
    first, second = await mesh.create(), await mesh.create()
    await mesh.models.DeleteModel(pb.DeleteModelRequest(id=first.id))
    assert host.names("Forget") == []
    await mesh.models.DeleteModel(pb.DeleteModelRequest(id=second.id))
    (asked,) = host.names("Forget")
    assert (asked.source.identifier, asked.digest) == ("tiny", "digest-tiny")


async def test_unknown_models_are_named_in_the_answer(mesh: Mesh, host: FakeHost) -> None:
    for call in (
        mesh.get("m_none"),
        mesh.load("m_none"),
        mesh.models.UnloadModel(pb.UnloadModelRequest(id="m_none")),
        mesh.models.EstimateModel(pb.EstimateModelRequest(id="m_none")),
        mesh.models.DeleteModel(pb.DeleteModelRequest(id="m_none")),
    ):
        failure = await refused(call)
        assert (failure.code, failure.reason, failure.facts["model_id"]) == ("NOT_FOUND", "MODEL_NOT_FOUND", "m_none")


async def test_writes_are_audited_with_who_what_and_how_it_ended(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    await refused(mesh.models.UpdateModel(pb.UpdateModelRequest(id=model.id, name="x", etag="99")))
    async with mesh.database.connection() as conn:
        rows = await conn.fetch("SELECT caller, method, resource, outcome FROM audit_log ORDER BY id")
    methods = [(row["caller"], row["method"].rpartition("/")[2], row["resource"], row["outcome"]) for row in rows]
    assert methods == [("ada", "CreateModel", "", "OK"), ("ada", "UpdateModel", model.id, "STALE_ETAG")]
