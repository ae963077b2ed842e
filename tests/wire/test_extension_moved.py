"""Everything stopped, the state directory moved, everything started again: the same bits. Small; e2e has it whole."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from lensmesh.extensions.v1 import extensions_pb2 as pb

from services.kit.database import Database
from tests import models
from tests.extended import by_peft, ours, t5_logits, trained_numbers
from tests.wire.extensions_support import MODEL, Mesh, meshing
from tests.wire.test_extension_models import done, get
from tests.wire.test_extensions import create, train

TRAINING = {"max_length": 48, "held_out_dataset_id": "", "learning_rate": 2e-2, "steps": 4}


async def answers(mesh: Mesh, extension_id: str) -> tuple[float, float, list[int]]:
    request = pb.EvaluateExtensionRequest(id=extension_id, dataset_id="ds_1", max_length=48)
    judged = await mesh.stub.EvaluateExtension(request)
    wanted = pb.GenerateWithExtensionRequest(id=extension_id, prompt="def add", max_new_tokens=6)
    return judged.base_loss, judged.loss, list((await mesh.stub.GenerateWithExtension(wanted)).token_ids)


def opened(mesh: Mesh, extension: pb.Extension) -> Path:
    return mesh.context.artifacts.path(extension.artifact_uri)


async def test_two_tasks_over_one_layer_survive_a_move_bit_for_bit(database: Database, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    root = tmp_path / "models"
    models.copied(root, "t5", 2)
    lines = [json.dumps({"question": text[:30], "answer": text[30:50]}) for text in models.TEXTS * 2]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    await database.pool.execute(
        "INSERT INTO models (id, name, model_type, source, model_identifier, created_by)"
        " VALUES ($1, 'tiny', 't5', 'local', 't5', 'ada')",
        MODEL,
    )
    hybrid: dict[str, Any] = {
        "kind": pb.EXTENSION_KIND_HYBRID,
        "lora": pb.LoraConfig(r=4, target_modules=["q", "v"]),
    }
    base = models.tiny("t5", 2)
    bare = t5_logits(base)
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(meshing(database, tmp_path / "state", root, family="t5"))
        mesh.registry.targets, mesh.registry.texts = True, {"ds_1": []}
        layer = pb.LayerConfig(position="LAYER_POSITION_ENCODER", initialization_scale=0.5)
        first = await create(mesh, task_name="task-a", layer=layer, **hybrid)
        second = await create(mesh, task_name="task-b", shared_layer_of=first.id, **hybrid)
        for made in (first, second):
            await done(mesh, await train(mesh, made.id, **TRAINING))
        kept = [await get(mesh, made.id) for made in (first, second)]
        said = [await answers(mesh, made.id) for made in kept]
        logits = [ours(base, opened(mesh, made)) for made in kept]
    (tmp_path / "state").rename(tmp_path / "moved")
    async with meshing(database, tmp_path / "moved", root, family="t5") as mesh:
        mesh.registry.targets, mesh.registry.texts = True, {"ds_1": []}
        assert [await get(mesh, made.id) for made in kept] == kept
        assert [await answers(mesh, made.id) for made in kept] == said
        again = models.tiny("t5", 2)
        for made, before in zip(kept, logits, strict=True):
            folder = opened(mesh, made)
            after = ours(again, folder)
            assert torch.equal(after, before)
            assert not torch.equal(after, bare)
            assert torch.equal(by_peft(root / "t5", folder), after)
            assert trained_numbers(again, folder) == made.parameter_counts.trainable
        assert torch.equal(t5_logits(again), bare)
