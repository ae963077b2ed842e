"""Many tasks on one base in the pool: counted once, switched without mixing, gone without a trace."""

from __future__ import annotations

import asyncio
import random
import weakref
from pathlib import Path

import pytest
import torch

from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.kit import errors
from services.residency.generation import Continuation
from services.residency.lenses import Spec
from services.residency.lenses.extension_files import attachable, retrained, stored_bytes
from services.residency.pool import Pool
from services.residency.quantize import resident_bytes
from tests import models

GIB = 1 << 30


@pytest.fixture
async def pool():
    made = Pool("cpu", GIB)
    await made.load("m", models.saved("llama", 2), "none")
    yield made
    await made.close()


def folder(path: Path, seed: int, kind: str = "lora", shared: Path | None = None) -> Path:
    """An extension that does something, its weights by the seed."""
    layers = () if shared or kind == "lora" else (LayerPlacement(position="decoder", initialization_scale=0.5),)
    config = ExtensionConfig(lora_r=2 + seed % 3, layers=layers, shared_layer_of="x" if shared else "")
    model = models.tiny("llama", 2)
    for name in (path, path.with_suffix(".trained")):
        name.mkdir()
    blueprint = Blueprint(kind=kind, task_name="task-one", config=config, base_parameters=1, seed=seed, shared=shared)
    blueprint.prepare(model)(path)
    extension = attachable(path, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in extension.trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    retrained(path, extension, {})(path.with_suffix(".trained"))
    return path.with_suffix(".trained")


async def test_a_shared_layer_is_counted_once_as_long_as_anybody_holds_it(pool, tmp_path):
    base = pool.used_bytes
    first = folder(tmp_path / "first", 0, "hybrid")
    await pool.attach("m", Spec("a", "extension", folder=first))
    alone = pool.used_bytes - base
    await pool.attach("m", Spec("b", "extension", folder=folder(tmp_path / "second", 3, "hybrid", shared=first)))
    extensions = pool.get("m").base.extensions
    layer = sum(extensions["b"].parameters[key].nbytes for key in extensions["b"].frozen)
    assert layer > 0
    adapter = alone - layer
    assert pool.used_bytes == base + layer + 2 * adapter
    held = {id(p): p.nbytes for key in ("a", "b") for p in extensions[key].parameters.values()}
    assert pool.used_bytes == resident_bytes(pool.get("m").base.model) + sum(held.values())
    assert await pool.detach("m", "a") == adapter
    assert pool.used_bytes == base + layer + adapter
    assert await pool.detach("m", "b") == layer + adapter
    assert pool.used_bytes == base


async def test_concurrent_requests_for_many_tasks_never_mix(pool, tmp_path):
    """Random activations, deactivations and generations; each answer is the one computed alone."""
    keys: list[str | None] = [None]
    shared = None
    for seed in range(6):
        kind = "lora" if seed < 3 else "hybrid"
        made = folder(tmp_path / str(seed), seed, kind, shared)
        shared = made if seed == 3 else shared if seed > 3 else None
        await pool.attach("m", Spec(f"task-{seed}", "extension", folder=made))
        keys.append(f"task-{seed}")
    resident = pool.get("m")

    async def generate(key: str | None, seed: int, temperature: float) -> list[int]:
        async with pool.lease("m", key) as lease:
            prompt = models.batch(1, 4 + seed, seed=seed)[0].tolist()
            work = Continuation(resident.base, prompt, max_new_tokens=20, temperature=temperature, seed=seed)
            while not work.done:
                await lease.run(work.turn, None)
            return work.tokens

    asked = [(key, seed, temperature) for key in keys for seed, temperature in ((0, 0.0), (3, 1.0))]
    alone = {request: await generate(*request) for request in asked}
    assert len({tuple(tokens) for tokens in alone.values()}) > len(keys)

    async def client(number: int) -> None:
        dice = random.Random(number)
        for _ in range(4):
            if dice.random() < 0.3:
                await pool.switch("m", dice.choice(keys))
            request = dice.choice(asked)
            assert await generate(*request) == alone[request], request

    await asyncio.gather(*map(client, range(8)))
    await pool.switch("m", None)
    assert await generate(None, 0, 0.0) == alone[None, 0, 0.0]
    for key in keys[1:]:
        await pool.detach("m", str(key))
    assert pool.used_bytes == resident.nbytes


async def test_detaching_gives_the_memory_back(pool, tmp_path):
    made = folder(tmp_path / "x", 0, "hybrid")
    await pool.attach("m", Spec("a", "extension", folder=made))
    held = [weakref.ref(parameter) for parameter in pool.get("m").base.extensions["a"].parameters.values()]
    await pool.detach("m", "a")
    assert [ref for ref in held if ref() is not None] == []


async def test_what_does_not_fit_is_refused_before_its_weights_are_read(pool, tmp_path):
    first = folder(tmp_path / "first", 0, "hybrid")
    second = folder(tmp_path / "second", 3, "hybrid", shared=first)
    base = pool.get("m").base
    assert base.model.dtype == torch.float32
    size = stored_bytes(first, base.extensions)
    assert size == attachable(first, base.model).nbytes
    pool.budget_bytes = pool.used_bytes + size - 1
    weights = first / "inserted.safetensors"
    stored = weights.read_bytes()
    weights.write_bytes(stored[:-4] + bytes(4))  # reading them would tell
    with pytest.raises(errors.Exhausted) as refused:
        await pool.attach("m", Spec("a", "extension", folder=first))
    assert refused.value.reason == "INSUFFICIENT_MEMORY"
    assert list(base.extensions) == []
    weights.write_bytes(stored)
    pool.budget_bytes += 1 + stored_bytes(second, base.extensions) - size
    await pool.attach("m", Spec("b", "extension", folder=second))
    shared = stored_bytes(first, base.extensions)
    assert 0 < shared < size
    pool.budget_bytes = pool.used_bytes + shared
    await pool.attach("m", Spec("a", "extension", folder=first))
    assert pool.used_bytes == pool.budget_bytes
