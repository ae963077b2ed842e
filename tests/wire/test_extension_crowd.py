"""Many clients, many tasks, one base: no answer is another task's."""

from __future__ import annotations

import asyncio
import random

import pytest
from lensmesh.extensions.v1 import extensions_pb2 as pb

from tests.wire.extensions_support import Mesh
from tests.wire.test_extensions import base_logits, create, mesh

__all__ = ["mesh"]
CLIENTS = 16


@pytest.mark.parametrize("requests", [48, pytest.param(1000, marks=pytest.mark.demo)])
@pytest.mark.timeout(600)
async def test_every_answer_is_the_one_computed_alone(mesh: Mesh, requests: int) -> None:
    """Random activations, deactivations and continuations from 16 clients over 8 tasks (vllm#47724)."""
    layers = [pb.LayerConfig(index=index, initialization_scale=scale) for index in (1, 2, 3, 4) for scale in (0.4, 1.0)]
    tasks = [
        await create(mesh, task_name=f"task-{n}", kind=pb.EXTENSION_KIND_LAYER, lora=None, layer=layer)
        for n, layer in enumerate(layers)
    ]

    async def continued(extension_id: str) -> list[int]:
        wanted = pb.GenerateWithExtensionRequest(id=extension_id, prompt="def add", max_new_tokens=6)
        return list((await mesh.stub.GenerateWithExtension(wanted)).token_ids)

    alone = {task.id: await continued(task.id) for task in tasks}
    assert len({tuple(tokens) for tokens in alone.values()}) > 4, "the tasks answer differently"
    before = await base_logits(mesh)
    asked = {"generate": 0, "activate": 0, "deactivate": 0}

    async def client(number: int) -> None:
        dice = random.Random(number)
        for _ in range(requests // CLIENTS + (number < requests % CLIENTS)):
            task = dice.choice(tasks)
            what = dice.choice(list(asked))
            asked[what] += 1
            if what == "generate":
                assert await continued(task.id) == alone[task.id]
            elif what == "activate":
                done = await mesh.stub.ActivateExtension(pb.ActivateExtensionRequest(id=task.id))
                assert done.active
            else:
                done = await mesh.stub.DeactivateExtension(pb.DeactivateExtensionRequest(id=task.id))
                assert not done.active

    await asyncio.gather(*map(client, range(CLIENTS)))
    assert sum(asked.values()) == requests
    assert min(asked.values()) > requests // 8
    for task in tasks:
        await mesh.stub.DeactivateExtension(pb.DeactivateExtensionRequest(id=task.id))
    assert (await base_logits(mesh)).equal(before)
