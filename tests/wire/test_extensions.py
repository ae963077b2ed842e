"""ExtensionService over real gRPC and PostgreSQL, on a tiny GPT-2 in a real residency pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.extensions.v1 import extensions_pb2 as pb
from lensmesh.registry.v1 import groups_pb2
from lensmesh.residency.v1 import residency_pb2
from peft import PeftModel

from services.kit.database import Database
from services.kit.jobs import Job
from services.residency.splice import logits
from tests import models
from tests.support import eventually
from tests.wire.extensions_support import MODEL, Mesh, meshing

TRAINABLE = 4 * 4 * (models.WIDTH + 3 * models.WIDTH)


@pytest.fixture
async def mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    models.copied(tmp_path / "models", "gpt2")
    await database.pool.execute(
        "INSERT INTO models (id, name, model_type, source, model_identifier, created_by)"
        " VALUES ($1, 'tiny', 'gpt2', 'local', 'gpt2', 'ada')",
        MODEL,
    )
    async with meshing(database, tmp_path / "state", tmp_path / "models") as mesh:
        mesh.registry.texts = {"ds_1": list(models.TEXTS) * 4, "ds_2": list(models.TEXTS)}
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


async def create(mesh: Mesh, **changes: Any) -> pb.Extension:
    wanted = {"model_id": MODEL, "task_name": "python-2", "kind": pb.EXTENSION_KIND_LORA, "lora": pb.LoraConfig(r=4)}
    return await mesh.stub.CreateExtension(pb.CreateExtensionRequest(**wanted | changes))


async def train(mesh: Mesh, extension_id: str, **changes: Any) -> str:
    wanted = {
        "id": extension_id, "dataset_id": "ds_1", "held_out_dataset_id": "ds_2", "steps": 12,
        "batch_size": 4, "learning_rate": 5e-3, "max_length": 16, "seed": 1,
    }  # fmt: skip
    return (await mesh.stub.TrainExtension(pb.TrainExtensionRequest(**wanted | changes))).job_id


@asynccontextmanager
async def working(mesh: Mesh, incarnation: str = "w1") -> AsyncIterator[None]:
    task = asyncio.create_task(mesh.worker(incarnation).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ended(mesh: Mesh, job_id: str) -> Job:
    async def check() -> Job | None:
        job = await mesh.context.jobs.get(job_id)
        return job if job.ended else None

    return await eventually(check, timeout=60.0)


async def base_logits(mesh: Mesh) -> torch.Tensor:
    async with mesh.context.residency.lease(MODEL) as lease:
        return await lease.run(logits, lease.model, models.batch())


async def continuation(mesh: Mesh, **named: Any) -> list[int]:
    request = residency_pb2.GenerateRequest(model_id=MODEL, prompt="def add", max_new_tokens=8, **named)
    return list((await mesh.host.Generate(request)).token_ids)


async def test_create_counts_stores_and_answers_repetitions(mesh: Mesh) -> None:
    planned = await create(mesh, validate_only=True)
    assert planned.id == ""
    assert planned.parameter_counts.lora == planned.parameter_counts.trainable == TRAINABLE
    assert planned.parameter_counts.base == 123_456
    assert planned.parameter_counts.trainable_over_base == TRAINABLE / 123_456
    assert (await mesh.stub.ListExtensions(pb.ListExtensionsRequest())).total == 0

    made = await create(mesh, request_id="r1")
    again = await create(mesh, request_id="r1")
    assert made.id.startswith("x_")
    assert again == made
    assert list(made.lora.target_modules) == ["c_attn"]
    assert (made.lora.r, made.lora.alpha, made.lora.dropout) == (4, 32, 0.1)
    assert made.status == pb.EXTENSION_STATUS_CREATED
    assert made.artifact_uri == f"artifact://extension/{made.digest}"
    assert made.created_by == "mesh"
    code, reason, _ = await refused(create(mesh, request_id="r1", task_name="other"))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_ID_REUSED")
    assert (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))) == made


async def test_lists_are_paged_and_filtered(mesh: Mesh) -> None:
    made = [(await create(mesh, task_name=f"task-{index}")).id for index in range(3)]
    first = await mesh.stub.ListExtensions(pb.ListExtensionsRequest(limit=2))
    assert [extension.id for extension in first.extensions] == [made[2], made[1]]
    rest = await mesh.stub.ListExtensions(pb.ListExtensionsRequest(limit=2, page_token=first.next_page_token))
    assert ([extension.id for extension in rest.extensions], rest.next_page_token) == ([made[0]], "")
    only = await mesh.stub.ListExtensions(pb.ListExtensionsRequest(task_name="task-1"))
    assert ([extension.id for extension in only.extensions], only.total) == ([made[1]], 1)
    _, reason, fields = await refused(mesh.stub.ListExtensions(pb.ListExtensionsRequest(page_token="x")))
    assert (reason, fields) == ("VALIDATION_ERROR", ["page_token"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lora": pb.LoraConfig(target_modules=["q_proj"])}, "lora.target_modules"),
        ({"lora": pb.LoraConfig(r=65)}, "lora.r"),
        ({"lora": pb.LoraConfig(r=0)}, "lora.r"),
        ({"lora": pb.LoraConfig(r=4, target_r=2)}, "lora.target_r"),
        ({"lora": pb.LoraConfig(r=4, variant=pb.LORA_VARIANT_ADALORA, target_r=4)}, "lora.target_r"),
        ({"kind": pb.EXTENSION_KIND_LAYER, "lora": None, "layer": pb.LayerConfig(index=6)}, "layer.index"),
        ({"kind": pb.EXTENSION_KIND_LAYER, "layer": pb.LayerConfig()}, "lora"),
        ({"layer": pb.LayerConfig()}, "layer"),
        ({"shared_layer_of": "x_none"}, "shared_layer_of"),
        ({"task_name": "c_attn"}, "task_name"),
        ({"kind": pb.EXTENSION_KIND_UNSPECIFIED}, "kind"),
    ],
)
async def test_wrong_fields_are_named_and_nothing_is_made(mesh: Mesh, changes: dict, field: str) -> None:
    code, reason, fields = await refused(create(mesh, **changes))
    assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR", [field])
    assert (await mesh.stub.ListExtensions(pb.ListExtensionsRequest())).total == 0


async def test_unknown_ids(mesh: Mesh) -> None:
    assert (await refused(create(mesh, model_id="m_none")))[:2] == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    calls = [
        mesh.stub.GetExtension(pb.GetExtensionRequest(id="x_none")),
        mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id="x_none")),
        mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id="x_none")),
        train(mesh, "x_none"),
    ]
    for call in calls:
        assert (await refused(call))[:2] == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def test_training_end_to_end_then_switch_generate_and_back(mesh: Mesh, tmp_path: Path) -> None:
    made = await create(mesh)
    job_id = await train(mesh, made.id)
    assert (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))).status == pb.EXTENSION_STATUS_TRAINING
    assert (await refused(train(mesh, made.id)))[1] == "WRONG_STATE"
    assert (await refused(mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id=made.id))))[1] == "WRONG_STATE"
    async with working(mesh):
        job = await ended(mesh, job_id)
    assert (job.state, job.error_code) == ("completed", None)

    trained = await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))
    assert (trained.status, trained.trained_steps) == (pb.EXTENSION_STATUS_TRAINED, 12)
    assert trained.loss_after < trained.loss_before - 0.2
    assert trained.digest != made.digest
    assert job.result["loss_after"] == trained.loss_after
    assert mesh.registry.reserved == [job_id]
    assert mesh.registry.ledger == {}

    before = await base_logits(mesh)
    evaluation = await mesh.stub.EvaluateExtension(
        pb.EvaluateExtensionRequest(id=made.id, dataset_id="ds_2", max_length=16)
    )
    assert evaluation.base_unchanged
    assert (evaluation.base_loss, evaluation.loss) == pytest.approx((trained.loss_before, trained.loss_after), rel=1e-6)

    bare = await continuation(mesh)
    generated = await mesh.stub.GenerateWithExtension(
        pb.GenerateWithExtensionRequest(id=made.id, prompt="def add", max_new_tokens=8)
    )
    assert list(generated.token_ids) != bare
    assert await continuation(mesh) == bare

    switch = await mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=made.id))
    assert (switch.active, switch.memory_after_bytes >= switch.memory_before_bytes) == (True, True)
    assert (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))).active
    off = await mesh.stub.DeactivateExtension(pb.DeactivateExtensionRequest(id=made.id))
    assert not off.active
    assert not (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))).active
    assert torch.equal(await base_logits(mesh), before)

    folder = mesh.context.artifacts.path(trained.artifact_uri)
    peft_model = PeftModel.from_pretrained(models.tiny("gpt2"), folder / "lora").eval()
    async with mesh.context.residency.lease(MODEL, made.id) as lease:
        ours = await lease.run(logits, lease.model, models.batch())
    with torch.inference_mode():
        assert torch.equal(peft_model(input_ids=models.batch()).logits, ours)


@pytest.mark.parametrize("kind", ["layer", "hybrid"])
async def test_layers_and_hybrids_are_trained_and_switched_like_adapters(mesh: Mesh, kind: str) -> None:
    lora = {"lora": pb.LoraConfig(r=4)} if kind == "hybrid" else {"lora": None}
    layer = pb.LayerConfig(index=2, initialization_scale=0.0)
    made = await create(mesh, kind=f"EXTENSION_KIND_{kind.upper()}", layer=layer, **lora)
    assert [(layer.position, layer.index) for layer in made.layers] == [(pb.LAYER_POSITION_DECODER, 2)]
    one_layer = sum(parameter.numel() for parameter in models.tiny("gpt2").transformer.h[0].parameters())
    assert (made.parameter_counts.layer, made.parameter_counts.lora > 0) == (one_layer, kind == "hybrid")
    job_id = await train(mesh, made.id, steps=6)
    async with working(mesh):
        job = await ended(mesh, job_id)
    assert job.state == "completed", job.error_message
    assert job.result["loss_after"] < job.result["loss_before"]
    before, bare = await base_logits(mesh), await continuation(mesh)
    assert (await mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=made.id))).active
    generated = await mesh.stub.GenerateWithExtension(
        pb.GenerateWithExtensionRequest(id=made.id, prompt="def add", max_new_tokens=8)
    )
    assert list(generated.token_ids) != bare
    await mesh.stub.DeactivateExtension(pb.DeactivateExtensionRequest(id=made.id))
    assert torch.equal(await base_logits(mesh), before)
    assert await continuation(mesh) == bare


async def test_several_extensions_continue_their_prompts_in_one_call(mesh: Mesh) -> None:
    first, second = await create(mesh), await create(mesh, lora=pb.LoraConfig(r=2, variant="LORA_VARIANT_RSLORA"))
    asked = [(first, "def add", 8), (second, "class Stack:", 3), (first, "for index in", 5)]
    requests = [pb.GenerateWithExtensionRequest(id=x.id, prompt=p, max_new_tokens=n) for x, p, n in asked]
    alone = [(await mesh.stub.GenerateWithExtension(request)).token_ids for request in requests]
    answer = await mesh.stub.GenerateTogether(pb.GenerateTogetherRequest(requests=requests))
    assert [list(made.token_ids) for made in answer.texts] == [list(tokens) for tokens in alone]
    assert [len(tokens) for tokens in alone] == [8, 3, 5]
    layer = await create(mesh, kind="EXTENSION_KIND_LAYER", layer=pb.LayerConfig(), lora=None)
    requests[1].id = layer.id
    code, _, fields = await refused(mesh.stub.GenerateTogether(pb.GenerateTogetherRequest(requests=requests)))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["requests.extension"])


async def test_a_continuation_is_streamed_a_token_at_a_time(mesh: Mesh) -> None:
    """The parts are the whole, half a character is held back, and a reader that leaves ends the work."""
    made = await create(mesh)
    wanted = pb.GenerateWithExtensionRequest(id=made.id, prompt="def add", max_new_tokens=24, temperature=8.0, seed=3)
    whole = await mesh.stub.GenerateWithExtension(wanted)
    parts = [part async for part in mesh.stub.GenerateWithExtensionStream(wanted)]
    assert [list(part.token_ids) for part in parts] == [[token] for token in whole.token_ids]
    assert "".join(part.text for part in parts) == whole.text
    assert all(not part.text.endswith("\ufffd") for part in parts[:-1])
    seconds = [part.seconds for part in parts]
    assert seconds == sorted(seconds)

    call = mesh.stub.GenerateWithExtensionStream(wanted)
    await call.read()
    call.cancel()

    async def idle() -> bool:
        return mesh.context.residency.get(MODEL).leases == 0

    await eventually(idle)
    code, reason, _ = await refused(
        mesh.stub.GenerateWithExtensionStream(pb.GenerateWithExtensionRequest(id="x_none", prompt="x")).read()
    )
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def test_events_are_contiguous_and_tell_the_loss(mesh: Mesh, database: Database) -> None:
    made = await create(mesh)
    job_id = await train(mesh, made.id, steps=3)
    async with working(mesh):
        await ended(mesh, job_id)
    rows = await database.pool.fetch(
        "SELECT event, sequence, data FROM events WHERE topic = $1 ORDER BY sequence", f"extension:{made.id}"
    )
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["event"] for row in rows] == [
        "extension:queued", "extension:started", *["extension:progress"] * 3, "extension:completed",
    ]  # fmt: skip
    progress, completed = rows[-2]["data"], rows[-1]["data"]
    assert (progress["extension_id"], progress["job_id"]) == (made.id, job_id)
    assert (progress["step"], progress["steps"]) == (3, 3)
    assert progress["loss"] > 0
    assert completed["loss_after"] < completed["loss_before"]


async def test_a_training_that_is_interrupted_ends_with_the_same_weights(mesh: Mesh, database: Database) -> None:
    """The first worker is stopped in the middle; another one goes on from its state, under a higher fence."""
    whole, cut = await create(mesh, task_name="whole"), await create(mesh, task_name="whole")
    first = await train(mesh, whole.id, steps=30)
    async with working(mesh):
        await ended(mesh, first)
    second = await train(mesh, cut.id, steps=30)

    async def begun() -> bool:
        return (await mesh.context.jobs.get(second)).progress > 10

    async with working(mesh, "w1"):
        await eventually(begun)
    stopped = await mesh.context.jobs.get(second)
    assert stopped.state == "queued"
    assert 10 < stopped.progress < 100
    assert await database.pool.fetchval("SELECT checkpoint_uri FROM extension_trainings WHERE job_id = $1", second)
    async with working(mesh, "w2"):
        job = await ended(mesh, second)
    assert (job.state, job.fence > stopped.fence) == ("completed", True)
    results = [await mesh.stub.GetExtension(pb.GetExtensionRequest(id=x.id)) for x in (whole, cut)]
    assert results[0].digest == results[1].digest
    assert not await database.pool.fetchval("SELECT count(*) FROM artifacts WHERE kind = 'extension_checkpoint'")


async def test_a_worker_that_lost_its_lease_publishes_nothing(mesh: Mesh, database: Database) -> None:
    made = await create(mesh)
    job_id = await train(mesh, made.id, steps=40)

    async def begun() -> bool:
        return (await mesh.context.jobs.get(job_id)).progress > 5

    async with working(mesh, "w1"):
        await eventually(begun)
        await database.pool.execute("UPDATE jobs SET owner = 'w2', fence = fence + 1 WHERE id = $1", job_id)

        async def released() -> bool:
            return not mesh.registry.ledger

        await eventually(released)
    assert await database.pool.fetchval("SELECT count(*) FROM extension_versions WHERE extension_id = $1", made.id) == 1
    assert (await mesh.context.jobs.get(job_id)).owner == "w2"


async def test_a_failed_training_says_why_and_keeps_the_weights(mesh: Mesh) -> None:
    made = await create(mesh)
    mesh.registry.texts["ds_1"] = ["only one row"]
    job_id = await train(mesh, made.id, held_out_dataset_id="")
    async with working(mesh):
        job = await ended(mesh, job_id)
    assert (job.state, job.error_code) == ("failed", "VALIDATION_ERROR")
    failed = await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))
    assert (failed.status, failed.error_code) == (pb.EXTENSION_STATUS_FAILED, "VALIDATION_ERROR")
    assert "held_out_dataset_id" in failed.error_message
    assert failed.digest == made.digest
    assert await train(mesh, made.id) != job_id


async def test_a_base_serves_others_while_it_is_trained(mesh: Mesh) -> None:
    made = await create(mesh)
    job_id = await train(mesh, made.id, steps=200)
    async with working(mesh):

        async def begun() -> bool:
            return (await mesh.context.jobs.get(job_id)).progress > 1

        await eventually(begun)
        answers = [(await base_logits(mesh), await continuation(mesh)) for _ in range(5)]
        assert not (await mesh.context.jobs.get(job_id)).ended
        await mesh.context.jobs.request_cancel(job_id)
        assert (await ended(mesh, job_id)).state == "cancelled"
    bare, text = await base_logits(mesh), await continuation(mesh)
    assert all(torch.equal(found, bare) and tokens == text for found, tokens in answers)
    assert (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))).status == pb.EXTENSION_STATUS_CREATED


async def test_deleting_gives_the_memory_back(mesh: Mesh) -> None:
    made = await create(mesh)
    await mesh.stub.GenerateWithExtension(pb.GenerateWithExtensionRequest(id=made.id, prompt="x", max_new_tokens=1))
    bare = await continuation(mesh)
    before = mesh.context.residency.used_bytes
    switch = await mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=made.id))
    assert switch.memory_after_bytes == before + 4 * TRAINABLE
    await mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id=made.id))
    resident = mesh.context.residency.get(MODEL)
    assert (resident.active, dict(resident.lenses), list(resident.base.extensions)) == (None, {}, [])
    assert mesh.context.residency.used_bytes == before
    assert await continuation(mesh) == bare


async def test_deleting_takes_rows_and_files_but_not_what_others_share(mesh: Mesh, database: Database) -> None:
    one, twin = await create(mesh), await create(mesh)
    assert one.artifact_uri == twin.artifact_uri
    mesh.registry.groups = [groups_pb2.Group(lenses=[groups_pb2.Lens(id="lens_1", extension_id=one.id)])]
    assert (await refused(mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id=one.id))))[1] == "IN_USE"
    mesh.registry.groups = []
    folder = mesh.context.artifacts.path(one.artifact_uri)
    await mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id=one.id))
    assert folder.is_dir()
    await mesh.stub.DeleteExtension(pb.DeleteExtensionRequest(id=twin.id))
    assert not folder.exists()
    assert await database.pool.fetchval("SELECT count(*) FROM extension_versions") == 0
