"""Extensions that leave their base: merged, exported, imported, trained with it; and layers that several share."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import grpc
import pytest
import torch
from lensmesh.extensions.v1 import extensions_pb2 as pb
from lensmesh.registry.v1 import devices_pb2
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.kit.database import Database
from tests import models
from tests.wire.extensions_support import MODEL, Mesh, meshing
from tests.wire.test_extensions import base_logits, create, ended, mesh, refused, train, working

__all__ = ["mesh"]


async def done(mesh: Mesh, job_id: str) -> dict[str, Any]:
    async with working(mesh):
        job = await ended(mesh, job_id)
    assert job.state == "completed", (job.error_code, job.error_message)
    return job.result


async def get(mesh: Mesh, extension_id: str) -> pb.Extension:
    return await mesh.stub.GetExtension(pb.GetExtensionRequest(id=extension_id))


async def loss(mesh: Mesh, extension_id: str) -> float:
    request = pb.EvaluateExtensionRequest(id=extension_id, dataset_id="ds_2", max_length=16)
    return (await mesh.stub.EvaluateExtension(request)).loss


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=models.batch()).logits


async def extended_logits(mesh: Mesh, extension: pb.Extension) -> torch.Tensor:
    await mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=extension.id))
    async with mesh.context.residency.lease(MODEL, extension.id) as lease:
        return await lease.run(logits_of, lease.model)


async def test_a_merge_becomes_a_registered_model(mesh: Mesh) -> None:
    hybrid = {"kind": pb.EXTENSION_KIND_HYBRID, "layer": pb.LayerConfig(index=1, initialization_scale=0.5)}
    made = await create(mesh, **hybrid)
    await done(mesh, await train(mesh, made.id, steps=4))
    trained, before = await get(mesh, made.id), await base_logits(mesh)
    expected = await extended_logits(mesh, trained)
    request = pb.MergeExtensionRequest(id=made.id, name="tiny and python", request_id="once")
    job_id = (await mesh.stub.MergeExtension(request)).job_id
    assert (await mesh.stub.MergeExtension(request)).job_id == job_id
    result = await done(mesh, job_id)
    ((digest, registered),) = mesh.registry.registered.items()
    assert (registered.name, registered.request_id) == ("tiny and python", job_id)
    folder = mesh.context.artifacts.path(f"artifact://model/{digest}")
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    difference = float((logits_of(merged) - expected).abs().max())
    assert difference < 1e-4
    assert 0 <= result["largest_logit_difference"] < 1e-4
    assert merged.config.num_hidden_layers == 5
    assert AutoTokenizer.from_pretrained(folder)("def add").input_ids == models.tokenizer()("def add").input_ids
    assert torch.equal(await base_logits(mesh), before)
    assert mesh.registry.ledger == {}
    unknown = mesh.stub.MergeExtension(pb.MergeExtensionRequest(id="x_none"))
    assert (await refused(unknown))[0] == grpc.StatusCode.NOT_FOUND


async def test_an_export_is_what_plain_peft_loads_and_comes_back_as_an_import(mesh: Mesh, tmp_path: Path) -> None:
    made = await create(mesh)
    await done(mesh, await train(mesh, made.id, steps=4))
    trained = await get(mesh, made.id)
    parts = [part async for part in mesh.stub.ExportExtension(pb.ExportExtensionRequest(id=made.id))]
    assert {part.content_type for part in parts} == {"application/zip"}
    with ZipFile(io.BytesIO(b"".join(part.data for part in parts))) as archive:
        archive.extractall(tmp_path / "models" / "adapters" / "python")
    folder = tmp_path / "models" / "adapters" / "python"
    theirs = PeftModel.from_pretrained(models.tiny("gpt2"), folder).eval()
    expected = await extended_logits(mesh, trained)
    assert torch.equal(logits_of(theirs), expected)
    wanted = pb.ImportExtensionRequest(model_id=MODEL, task_name="python-3", identifier="adapters/python")
    back = await mesh.stub.ImportExtension(wanted)
    assert (back.kind, back.lora.r, list(back.lora.target_modules)) == (pb.EXTENSION_KIND_LORA, 4, ["c_attn"])
    assert back.parameter_counts == trained.parameter_counts
    assert torch.equal(await extended_logits(mesh, back), expected)


@pytest.mark.parametrize(
    ("damage", "field"),
    [("truncated", "weights"), ("settings", "adapter_config.use_dora"), ("rank", "weights"), ("outside", "identifier")],
)
async def test_an_import_that_does_not_fit_names_the_field_and_makes_nothing(
    mesh: Mesh, tmp_path: Path, damage: str, field: str
) -> None:
    folder = tmp_path / "models" / "adapter"
    get_peft_model(models.tiny("gpt2"), LoraConfig(r=4, target_modules=["c_attn"])).save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    stored = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "rank":
        config.write_text(json.dumps(stored | {"r": 8}))
    elif damage == "settings":
        config.write_text(json.dumps(stored | {"layers_to_transform": [1]}))
        field = "adapter_config.layers_to_transform"
    identifier = "../adapter" if damage == "outside" else "adapter"
    wanted = pb.ImportExtensionRequest(model_id=MODEL, task_name="python-3", identifier=identifier)
    code, reason, fields = await refused(mesh.stub.ImportExtension(wanted))
    assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR", [field])
    assert (await mesh.stub.ListExtensions(pb.ListExtensionsRequest())).total == 0


async def test_a_base_that_is_trained_too_becomes_a_new_model(mesh: Mesh) -> None:
    made = await create(mesh, freeze_base=False)
    assert not made.freeze_base
    assert made.parameter_counts.trainable == 123_456 + made.parameter_counts.lora
    before = await base_logits_once(mesh)
    result = await done(mesh, await train(mesh, made.id, steps=6))
    assert result["loss_after"] < result["loss_before"]
    ((digest, _),) = mesh.registry.registered.items()
    assert result["model_id"] == f"m_{digest[:8]}"
    model = AutoModelForCausalLM.from_pretrained(mesh.context.artifacts.path(f"artifact://model/{digest}"))
    base = models.tiny("gpt2")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])}
    assert {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"} <= changed
    assert torch.equal(await base_logits(mesh), before)
    after = await get(mesh, made.id)
    assert (after.digest, after.status) == (made.digest, pb.EXTENSION_STATUS_TRAINED)


async def base_logits_once(mesh: Mesh) -> torch.Tensor:
    """Of the base, which is loaded by its first use."""
    evaluated = await create(mesh, task_name="probe")
    await loss(mesh, evaluated.id)
    return await base_logits(mesh)


async def test_tasks_share_a_layer_and_only_its_training_changes_the_others(mesh: Mesh) -> None:
    layer = pb.LayerConfig(index=2, initialization_scale=0.5)
    hybrid = {"kind": pb.EXTENSION_KIND_HYBRID}
    first = await create(mesh, task_name="task-a", layer=layer, **hybrid)
    second = await create(mesh, task_name="task-b", shared_layer_of=first.id, **hybrid)
    third = await create(mesh, task_name="task-c", shared_layer_of=second.id, train_shared_layer=True, **hybrid)
    assert second.shared_layer_of == third.shared_layer_of == first.id
    assert list(second.layers) == list(first.layers)
    counts = second.parameter_counts
    assert (counts.shared, counts.trainable) == (counts.layer, counts.lora)
    assert third.parameter_counts.trainable == first.parameter_counts.trainable

    await done(mesh, await train(mesh, first.id, steps=4))
    kept, losses = await get(mesh, first.id), await loss(mesh, first.id)
    result = await done(mesh, await train(mesh, second.id, steps=4))
    assert "shared" not in result
    assert await get(mesh, first.id) == kept, "training B changed nothing of A"

    blocked = await train(mesh, third.id, steps=4)
    assert (await refused(train(mesh, first.id)))[1] == "WRONG_STATE"
    result = await done(mesh, blocked)
    told = result["shared"][first.id]
    assert told["loss_before"] == pytest.approx(losses, rel=1e-6)
    assert told["loss_after"] != told["loss_before"]
    assert await loss(mesh, first.id) == pytest.approx(told["loss_after"], rel=1e-6)
    assert await loss(mesh, second.id) == pytest.approx(result["shared"][second.id]["loss_after"], rel=1e-6)
    folders = [mesh.context.artifacts.path((await get(mesh, x.id)).artifact_uri) for x in (first, second, third)]
    assert len({(folder / "inserted.safetensors").stat().st_ino for folder in folders}) == 1, "on the disk once"


@pytest.fixture
async def t5_mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    models.copied(tmp_path / "models", "t5", 2)
    lines = [json.dumps({"question": text[:30], "answer": text[30:50]}) for text in models.TEXTS * 2]
    (tmp_path / "models" / "pairs.jsonl").write_text("\n".join(lines))
    await database.pool.execute(
        "INSERT INTO models (id, name, model_type, source, model_identifier, created_by)"
        " VALUES ($1, 'tiny', 't5', 'local', 't5', 'ada')",
        MODEL,
    )
    async with meshing(database, tmp_path / "state", tmp_path / "models", family="t5") as mesh:
        mesh.registry.texts = {"ds_1": list(models.TEXTS), "ds_2": list(models.TEXTS)}
        yield mesh


async def test_t5_is_trained_on_prompts_and_targets(t5_mesh: Mesh) -> None:
    layers = [pb.LayerConfig(position="LAYER_POSITION_BOTH", initialization_scale=0.0)]
    lora = pb.LoraConfig(r=4, target_modules=["q", "v"])
    made = await create(t5_mesh, kind=pb.EXTENSION_KIND_HYBRID, lora=lora, layers=layers)
    assert [layer.position for layer in made.layers] == [pb.LAYER_POSITION_ENCODER, pb.LAYER_POSITION_DECODER]
    before_zero = create(t5_mesh, kind=pb.EXTENSION_KIND_LAYER, lora=None, layer=pb.LayerConfig(index=0))
    assert (await refused(before_zero))[2] == ["layer.index"]
    code, reason, fields = await refused(train(t5_mesh, made.id))
    assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR", ["dataset_id"])
    assert (await get(t5_mesh, made.id)).status == pb.EXTENSION_STATUS_CREATED
    t5_mesh.registry.targets = True
    wanted = {"max_length": 48, "held_out_dataset_id": "", "learning_rate": 2e-2, "steps": 8, "patience": 3}
    extra = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "precision": pb.PRECISION_BF16}
    result = await done(t5_mesh, await train(t5_mesh, made.id, **wanted, **extra, evaluate_every=2))
    assert result["loss_after"] < result["loss_before"]
    assert result["best_step"] <= result["steps"] <= 8


async def test_training_settings_that_contradict_are_refused_before_a_job_is_queued(mesh: Mesh) -> None:
    made = await create(mesh)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"warmup_steps": 13}, "warmup_steps"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"dataset_id": "ds_none"}, ""),
    ]
    for changes, field in cases:
        _, _, fields = await refused(train(mesh, made.id, **changes))
        assert fields == ([field] if field else [])
    assert (await get(mesh, made.id)).status == pb.EXTENSION_STATUS_CREATED


async def test_an_extension_of_other_files_is_refused_with_both_digests(mesh: Mesh) -> None:
    mesh.registry.digest = "e" * 64
    made = await create(mesh)
    prompt = pb.GenerateWithExtensionRequest(id=made.id, prompt="def add", max_new_tokens=2)
    evaluate = pb.EvaluateExtensionRequest(id=made.id, dataset_id="ds_2", max_length=16)
    await mesh.registry.EnsureResident(devices_pb2.EnsureResidentRequest(host_id="device-0", model_id=MODEL), None)
    found = mesh.context.residency.get(MODEL).base.digest
    for call in (
        mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=made.id)),
        mesh.stub.GenerateWithExtension(prompt),
        mesh.stub.EvaluateExtension(evaluate),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        told = f"{caught.value.details()} {caught.value.trailing_metadata()}"
        assert "LENS_INCOMPATIBLE" in told
        assert "e" * 64 in told
        assert found in told
    job_id = await train(mesh, made.id)
    async with working(mesh):
        job = await ended(mesh, job_id)
    assert (job.state, job.error_code) == ("failed", "LENS_INCOMPATIBLE")
    assert (await get(mesh, made.id)).digest == made.digest
    resident = mesh.context.residency.get(MODEL)
    assert (dict(resident.lenses), resident.active, list(resident.base.extensions)) == ({}, None, [])
