"""The real registry and a real device process: both agree on every byte, whatever is loaded, parked or fails."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import devices_pb2, groups_pb2, models_pb2
from lensmesh.residency.v1 import residency_pb2

from services.kit.config import Settings
from services.kit.database import Database
from services.residency import estimate, sources
from services.residency.lenses import tuned_lens
from services.residency.loading import config_of
from services.residency.quantize import resident_bytes
from tests import models
from tests.support import eventually
from tests.wire.registry_support import Mesh, running
from tests.wire.residency_support import Host, extension, hosted, publish, refused
from tests.wire.test_residency import transcoder

LENS = 4 * 4 * models.WIDTH * (models.WIDTH + 1)
TEXT = models.TEXTS[0]


def required(folder: Path) -> int:
    """Bytes that a load of a model is planned with."""
    found = sources.inspect(sources.Source("local", folder.name), [folder.parent], folder.parent)
    return estimate.estimate(config_of(found.config), found.entries, "none", "cpu").required


@pytest.fixture
async def mesh(
    database: Database, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Mesh]:
    """Without heartbeats, which would put rows right that are wrong."""
    for name in ("HEARTBEAT_SECONDS", "HOST_TIMEOUT"):
        monkeypatch.setenv(f"LENSMESH_{name}", "3600")
    async with running(database, tmp_path / "state", nats_url) as mesh:
        yield mesh


@pytest.fixture
async def host(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """Its budget is what a base with two lenses takes, and the load of another model."""
    root = tmp_path / "models"
    for family in ("gpt2", "llama"):
        models.copied(root, family)
    budget = resident_bytes(models.tiny("llama")) + 2 * LENS + required(root / "gpt2")
    monkeypatch.setenv("LENSMESH_DEVICE_MEMORY_LIMIT", str(budget))
    monkeypatch.setenv("LENSMESH_PARK_MEMORY_LIMIT", str(2 * LENS))
    settings = Settings(state_dir=mesh.settings.state_dir, model_roots=[root])
    with models.one_thread():
        async with hosted(settings, mesh.database, mesh.internal) as host:
            (announce,) = host.part.background
            task = asyncio.create_task(announce())
            await eventually(lambda: known(mesh))
            yield host
            task.cancel()


async def known(mesh: Mesh) -> bool:
    return bool((await mesh.devices.ListDevices(devices_pb2.ListDevicesRequest())).devices)


async def assert_both_agree(mesh: Mesh, host: Host) -> None:
    device = await mesh.device()
    assert (device.used_bytes, device.parked_bytes) == (host.pool.used_bytes, host.pool.parked_bytes)
    assert device.used_bytes + device.reserved_bytes <= device.budget_bytes


async def grouped(mesh: Mesh, model: models_pb2.Model, root: Path, lenses: int) -> tuple[str, list[str]]:
    """A group of a base with so many tuned lenses."""
    group = await mesh.groups.CreateGroup(groups_pb2.CreateGroupRequest(name="g", model_id=model.id))
    request = groups_pb2.AttachLensRequest(group_id=group.id, kind=types_pb2.LENS_KIND_TUNED_LENS)
    made = []
    for number in range(lenses):
        layers = {layer: (torch.eye(models.WIDTH), torch.full((models.WIDTH,), float(number))) for layer in range(4)}
        tuned_lens.save(root / f"lens-{number}", layers)
        request.artifact_uri = f"local:lens-{number}"
        made.append((await mesh.groups.AttachLens(request)).id)
    return group.id, made


async def residency(mesh: Mesh, group_id: str) -> dict[str, int]:
    lenses = (await mesh.groups.GetGroup(groups_pb2.GetGroupRequest(id=group_id))).lenses
    return {lens.id: lens.residency for lens in lenses}


def leaving(plan: types_pb2.LoadPlan) -> list[tuple[str, str, bool]]:
    return [(each.lens_id or each.model_id, each.cause, each.parked) for each in plan.placements[0].evictions]


async def test_a_lens_is_parked_for_a_load_and_a_switch_takes_it_from_host_memory(
    mesh: Mesh, host: Host, tmp_path: Path
) -> None:
    base = await mesh.ready("llama", pinned=True)
    group_id, (first, second, third) = await grouped(mesh, base, tmp_path / "models", 3)
    await assert_both_agree(mesh, host)
    read = groups_pb2.AnalyzeTextRequest(id=group_id, text=TEXT, lens_ids=[first])
    before = (await mesh.groups.AnalyzeText(read)).readings
    for used in (second, third):
        await mesh.groups.SwitchLens(groups_pb2.SwitchLensRequest(id=group_id, lens_id=used))
    other = await mesh.create("gpt2")
    plan = (await mesh.load(other.id, validate_only=True)).plan
    assert leaving(plan) == [(first, "memory", True)]
    await mesh.load(other.id)
    await mesh.reaches(other.id, models_pb2.MODEL_STATUS_READY)
    parked, here = groups_pb2.RESIDENCY_PARKED, groups_pb2.RESIDENCY_DEVICE
    assert await residency(mesh, group_id) == {first: parked, second: here, third: here}
    assert host.pool.parked_bytes == LENS
    await assert_both_agree(mesh, host)
    ((name, data),) = await mesh.events(first)
    assert (name, data["freed_bytes"], data["cause"], data["parked"]) == ("lens:evicted", LENS, "memory", True)

    device = await mesh.device()
    free = device.budget_bytes - device.used_bytes
    await mesh.placement.Reserve(devices_pb2.ReserveRequest(host_id="device-0", owner="job", bytes=free))
    shutil.rmtree(tmp_path / "models" / "lens-0")
    switch = groups_pb2.SwitchLensRequest(id=group_id, lens_id=first, validate_only=True)
    plan = (await mesh.groups.SwitchLens(switch)).plan
    assert (plan.placements[0].restores, leaving(plan)) == (True, [(second, "memory", True)])
    switch.validate_only = False
    await mesh.groups.SwitchLens(switch)
    assert await residency(mesh, group_id) == {first: here, second: parked, third: here}
    await assert_both_agree(mesh, host)
    assert (await mesh.groups.AnalyzeText(read)).readings == before

    await mesh.models.UnloadModel(models_pb2.UnloadModelRequest(id=base.id))
    assert host.pool.parked_bytes == 0
    await assert_both_agree(mesh, host)
    assert set((await residency(mesh, group_id)).values()) == {groups_pb2.RESIDENCY_DISK}


async def forwards(host: Host, model_id: str) -> list[Callable[[], Awaitable[Any]]]:
    """Forwards on a model: through a transcoder, and through an extension at once and token by token."""
    base = host.pool.get(model_id).base
    uri = await publish(host, "transcoder", transcoder(layer=2).save)
    encode = residency_pb2.EncodeRequest(model_id=model_id, artifact_uri=uri, text=TEXT, top_k=2)
    uri = await publish(host, "extension", extension(base.model, base.digest, 1))
    lens = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    generate = residency_pb2.GenerateRequest(model_id=model_id, prompt=TEXT, max_new_tokens=3, extension=lens)

    async def encoded() -> Any:
        return (await host.stub.Encode(encode)).tokens

    async def generated() -> Any:
        return (await host.stub.Generate(generate)).token_ids

    async def streamed() -> Any:
        return [token async for part in host.stub.GenerateStream(generate) for token in part.token_ids]

    return [encoded, generated, streamed]


async def test_a_forward_that_runs_out_of_memory_is_made_once_more_without_what_is_idle(
    mesh: Mesh, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, idle = await mesh.ready("gpt2"), await mesh.create("llama")
    kind, short = type(host.pool.get(base.id).base.model.transformer), []
    compute = kind.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if short:
            raise short.pop()
        return compute(*arguments, **named)

    monkeypatch.setattr(kind, "forward", forward)

    async def crowd() -> None:
        await mesh.load(idle.id)
        await mesh.reaches(idle.id, models_pb2.MODEL_STATUS_READY)

    works = await forwards(host, base.id)
    for work in works:
        expected = await work()
        await crowd()
        short.append(MemoryError())
        assert (await work(), short) == (expected, [])
        assert [resident.model_id for resident in host.pool.residents] == [base.id]
        await assert_both_agree(mesh, host)
    evictions = [data["cause"] for name, data in await mesh.events(idle.id) if name == "model:evicted"]
    assert evictions == ["out_of_memory"] * len(works)
    await crowd()
    monkeypatch.setattr(host.pool, "budget_bytes", host.pool.used_bytes)  # no room for an extension
    assert await works[1]()
    assert [resident.model_id for resident in host.pool.residents] == [base.id]
    short[:] = [MemoryError(), MemoryError()]
    assert (await refused(works[0]()))[1] == "INSUFFICIENT_MEMORY"
