"""What the system behind spec/000 and spec/001 got wrong, one test each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2, models_pb2
from lensmesh.training.v1 import training_pb2

from services.kit.database import Database
from tests.wire.groups_support import add_host, group, reading, status, switch, switched
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def test_1_sizes_come_from_the_files_and_never_from_a_name(mesh: Mesh) -> None:
    await add_host(mesh)
    made = [await mesh.create("a", name=name) for name in ("gemma-3-27b", "opt-1.1b", "7b-70b")]
    assert {model.estimated_memory_bytes for model in made} == {110 * MB}


async def test_2_a_switch_that_cannot_fit_is_refused_before_the_old_group_moves(mesh: Mesh) -> None:
    host = await add_host(mesh, sizes={"a": 100 * MB, "b": 125 * MB})
    old, large = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, old)
    assert (await refused(switch(mesh, large))).reason == "INSUFFICIENT_MEMORY"
    assert not host.names("Park") + host.names("Unload")
    here = await status(mesh, old)
    assert (here.residency, here.fully_loaded, here.active_lens_id) == (pb.RESIDENCY_DEVICE, True, old[1])


async def test_3_an_activation_source_is_there_once_for_each_device(mesh: Mesh) -> None:
    names = ("cuda:0", "cuda:1")
    hosts = [await add_host(mesh, host_id=name, device=name, budget=230 * MB, park=300 * MB) for name in names]
    source = await mesh.create("c")
    groups = [await reading(mesh, name, source.id) for name in "ab"]
    for each in groups:
        await switched(mesh, each)
    where = {(await status(mesh, each)).device for each in groups}
    assert where == {"cuda:0/cuda:0", "cuda:1/cuda:1"}
    assert all(source.id in host.held for host in hosts)
    first = next(host for host in hosts if groups[0][0].model_id in host.held)
    other = next(host for host in hosts if host is not first)
    await mesh.models.UnloadModel(models_pb2.UnloadModelRequest(id=groups[0][0].model_id))
    plan = (await mesh.load(groups[0][0].model_id, device=other.device, validate_only=True)).plan
    assert {each.model_id for each in plan.placements[0].evictions} >= {groups[1][0].model_id}
    assert not other.held[source.id].parked
    assert (await status(mesh, groups[1])).fully_loaded


async def test_4_locations_are_true_after_every_move(mesh: Mesh) -> None:
    host = await add_host(mesh, park=220 * MB)
    groups = [await group(mesh, name) for name in "abc"]
    for turn in (0, 1, 0, 2, 1, 0):
        await switched(mesh, groups[turn])
        for made, _ in groups:
            held = host.held.get(made.model_id)
            expected = (
                pb.RESIDENCY_DISK if held is None else pb.RESIDENCY_PARKED if held.parked else pb.RESIDENCY_DEVICE
            )
            assert (await status(mesh, (made, ""))).residency == expected
        device = await mesh.device()
        parked = sum(held.memory_bytes + 7 * MB for held in host.held.values() if held.parked)
        assert (device.used_bytes, device.parked_bytes) == (107 * MB, parked)


async def test_5_what_is_parked_is_limited_in_bytes_and_as_many_give_way_as_it_takes(mesh: Mesh) -> None:
    small = dict.fromkeys("abc", 30 * MB)
    host = await add_host(mesh, budget=130 * MB, park=145 * MB, sizes={**small, "d": 100 * MB})
    groups = [await group(mesh, name) for name in "abc"]
    model = await mesh.create("d")
    large = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="d", model_id=model.id))
    for each in groups:
        await switched(mesh, each)
    job = await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=large.id))
    assert (await mesh.settled(job.job_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    parked = [made.model_id for made, _ in groups if made.model_id in host.held]
    assert parked == [made.model_id for made, _ in groups]  # three, far below the limit
    plan = (await switch(mesh, groups[2], validate_only=True)).plan
    leaving = [(each.model_id, each.cause) for each in plan.placements[0].evictions]
    assert leaving == [
        (groups[0][0].model_id, "park_limit"),
        (groups[1][0].model_id, "park_limit"),
        (model.id, "memory"),
    ]


@pytest.mark.parametrize("service", ["GroupService", "DeviceService", "ModelService", "DatasetService", "JobService"])
async def test_6_every_method_that_is_offered_is_there(mesh: Mesh, service: str) -> None:
    channel = mesh.as_user("ada")
    offered = Default().FindServiceByName(f"lensmesh.registry.v1.{service}").methods
    for method in (each for each in offered if not each.server_streaming):
        call = channel.unary_unary(f"/lensmesh.registry.v1.{service}/{method.name}")
        try:
            await call(b"")
        except grpc.aio.AioRpcError as error:
            assert error.code().name in ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"), method.name  # noqa: PT017


@dataclass
class Meeting(FakeHost):
    """Answers an attachment only when another one is under way."""

    meeting: asyncio.Barrier = field(default_factory=lambda: asyncio.Barrier(2))
    meets: bool = False

    async def AttachLens(self, request: Any, context: Any) -> Any:
        if self.meets:
            await self.meeting.wait()
        return await super().AttachLens(request, context)


async def test_7_a_groups_lenses_are_preloaded_side_by_side(mesh: Mesh) -> None:
    host = Meeting(sizes={"a": 100 * MB})
    host.transcoders["a"] = training_pb2.Transcoder(id="a", artifact_uri="artifact://transcoder/a", size_bytes=8 * MB)
    await mesh.add_host(host)
    model = await mesh.ready("a")
    made = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="a", model_id=model.id))
    request = pb.AttachLensRequest(group_id=made.id, kind=types.LENS_KIND_TRANSCODER, transcoder_id="a")
    lenses = [(await mesh.groups.AttachLens(request)).id for _ in range(4)]
    host.meets = True
    job = await mesh.groups.PreloadGroup(pb.PreloadGroupRequest(id=made.id))
    assert (await mesh.settled(job.task_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    told = [data["lens_id"] for name, data in await mesh.events(made.id) if name == "group:preload"]
    assert told[0] is None
    assert sorted(told[1:]) == sorted(lenses)
