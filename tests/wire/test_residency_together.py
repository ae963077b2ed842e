"""Generations of several tasks at the same time: in turns, and in the same forward passes."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from lensmesh.common.v1 import types_pb2
from lensmesh.residency.v1 import residency_pb2

from tests import models
from tests.wire.residency_support import Host, extension, hosting, publish, refused


@pytest.fixture
async def host(database, tmp_path):
    models.copied(tmp_path / "models", "gpt2")
    with models.one_thread():
        async with hosting(database, tmp_path / "state", tmp_path / "models") as host:
            yield host


async def test_generations_that_bring_the_same_extension_along_do_not_take_it_from_each_other(host):
    await host.load("m", "gpt2")
    base, used = host.pool.get("m").base, host.pool.used_bytes
    requests = [generation(seed, await guest(host, base, 1 + seed % 2)) for seed in range(4)]
    alone = [await host.stub.Generate(request) for request in requests]
    assert host.pool.get("m").lenses == {}
    together = await asyncio.gather(*(host.stub.Generate(request) for request in requests * 3))
    assert [list(made.token_ids) for made in together] == [list(made.token_ids) for made in alone] * 3
    assert host.pool.get("m").lenses == {}
    assert host.pool.used_bytes == used


async def test_several_tasks_are_continued_in_the_same_forward_passes(host):
    await host.load("m", "gpt2")
    base = host.pool.get("m").base
    lenses = [await guest(host, base, seed) for seed in (1, 2)]
    requests = [generation(seed, lens) for seed, lens in enumerate((*lenses, None, lenses[0]))]
    alone = [list((await host.stub.Generate(request)).token_ids) for request in requests]
    answer = await host.stub.GenerateTogether(residency_pb2.GenerateTogetherRequest(requests=requests))
    assert [list(made.token_ids) for made in answer.texts] == alone
    assert len({tuple(tokens) for tokens in alone}) == 4
    assert host.pool.get("m").lenses == {}
    changed = types_pb2.InterventionSpec(site="mlp_out", layer=1, op="OP_ZERO")
    requests[2].interventions.append(changed)
    call = host.stub.GenerateTogether(residency_pb2.GenerateTogetherRequest(requests=requests))
    code, _, _ = await refused(call)
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def guest(host: Host, base, seed: int) -> types_pb2.LensSpec:
    """An extension that is stored and not attached."""
    uri = await publish(host, "extension", extension(base.model, base.digest, seed))
    return types_pb2.LensSpec(lens_id=f"x{seed}", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)


def generation(seed: int, lens: types_pb2.LensSpec | None) -> residency_pb2.GenerateRequest:
    """One whose prompt and end depend on the seed."""
    return residency_pb2.GenerateRequest(
        model_id="m", prompt=models.TEXTS[0][: 20 + 5 * seed], max_new_tokens=6 + 5 * seed,
        seed=seed, temperature=seed % 2, extension=lens,
    )  # fmt: skip
