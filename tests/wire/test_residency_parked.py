"""Models and lenses that a host keeps in its memory, over real gRPC."""

from __future__ import annotations

import shutil

import pytest
from lensmesh.common.v1 import types_pb2
from lensmesh.residency.v1 import residency_pb2

from tests import models
from tests.wire.residency_support import extension, hosting, publish, refused

TEXT = models.TEXTS[0]


@pytest.fixture
async def host(database, tmp_path):
    models.copied(tmp_path / "models", "gpt2")
    with models.one_thread():
        async with hosting(database, tmp_path / "state", tmp_path / "models") as host:
            yield host


async def test_a_model_comes_parked_with_its_lens_and_is_whole_once_restored(host):
    loaded = (await host.load("m", "gpt2"))[-1].model
    await host.stub.Unload(residency_pb2.UnloadRequest(model_id="m"))
    parked = (await host.load("m", "gpt2", parked=True))[-1].model
    assert (parked.parked, parked.memory_bytes) == (True, loaded.memory_bytes)
    lens = types_pb2.LensSpec(lens_id="l", kind=types_pb2.LENS_KIND_LOGIT_LENS)
    request = residency_pb2.AttachLensRequest(model_id="m", lens=lens)
    assert (await refused(host.stub.AttachLens(request)))[1] == "WRONG_STATE"  # unless it is said that it may be parked
    request.parked = True
    await host.stub.AttachLens(request)
    assert (host.pool.used_bytes, host.pool.parked_bytes) == (0, loaded.memory_bytes)
    restored = await host.stub.Restore(residency_pb2.RestoreRequest(model_id="m"))
    assert (restored.parked, restored.fingerprint) == (False, loaded.fingerprint)
    assert [each.lens_id for each in restored.lenses] == ["l"]


async def test_a_lens_is_parked_alone_and_comes_back_without_its_files(host):
    await host.load("m", "gpt2")
    base = host.pool.get("m").base
    uri = await publish(host, "extension", extension(base.model, base.digest, 1))
    lens = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    attach = residency_pb2.AttachLensRequest(model_id="m", lens=lens)
    size = (await host.stub.AttachLens(attach)).memory_bytes
    asked = residency_pb2.GenerateRequest(model_id="m", prompt=TEXT, max_new_tokens=8, extension=lens)
    before, used = await host.stub.Generate(asked), host.pool.used_bytes
    park = residency_pb2.DetachLensRequest(model_id="m", lens_id="x", park=True)
    assert (await host.stub.DetachLens(park)).freed_bytes == size
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert [(each.lens_id, each.parked, each.memory_bytes) for each in state.models[0].lenses] == [("x", True, size)]
    assert (state.used_bytes, host.pool.parked_bytes) == (used - size, size)
    shutil.rmtree(host.context.artifacts.path(uri))
    assert (await host.stub.AttachLens(attach)).parked is False
    assert (host.pool.used_bytes, host.pool.parked_bytes) == (used, 0)
    assert (await host.stub.Generate(asked)).token_ids == before.token_ids
    await host.stub.DetachLens(park)
    lens.artifact_uri = await publish(host, "extension", extension(base.model, base.digest, 2))
    await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))  # other files, read
    assert host.pool.parked_bytes == 0
    await host.stub.DetachLens(park)
    assert (await host.stub.DetachLens(residency_pb2.DetachLensRequest(model_id="m", lens_id="x"))).freed_bytes == size
    assert (host.pool.used_bytes, host.pool.parked_bytes) == (used - size, 0)
