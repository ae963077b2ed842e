"""Switches between groups over gRPC: who is parked, who goes to disk, what is restored, and whose turn it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2, models_pb2
from lensmesh.registry.v1.groups_pb2_grpc import GroupServiceStub

from services.kit import errors
from services.kit.database import Database
from tests.support import eventually
from tests.wire.groups_support import add_host, group, leaving, reading, status, switch, switched
from tests.wire.registry_support import MB, Mesh, refused, running

UNLOADED, READY = models_pb2.MODEL_STATUS_UNLOADED, models_pb2.MODEL_STATUS_READY


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def test_the_old_group_is_parked_whole_and_comes_back_without_a_load(mesh: Mesh) -> None:
    host = await add_host(mesh, park=220 * MB)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    first = await switched(mesh, a)
    assert (first.position, leaving(first.plan)) == (1, [])
    plan = (await switch(mesh, b, validate_only=True)).plan
    assert leaving(plan) == [(a[0].model_id, "memory", True)]
    assert not host.names("Park")
    assert leaving((await switched(mesh, b)).plan) == leaving(plan)
    parked = await status(mesh, a)
    assert (parked.residency, parked.device, parked.resident_lens_ids) == (pb.RESIDENCY_PARKED, "", [])
    lens = (await mesh.groups.GetGroup(pb.GetGroupRequest(id=a[0].id))).lenses[0]
    assert lens.residency == pb.RESIDENCY_PARKED
    assert (await mesh.get(a[0].model_id)).status == UNLOADED
    device = await mesh.device()
    assert (device.used_bytes, device.reserved_bytes, device.parked_bytes) == (107 * MB, 0, 107 * MB)
    assert [model.model_id for model in device.parked_models] == [a[0].model_id]
    back = await switched(mesh, a)
    assert back.plan.placements[0].restores
    assert [request.model_id for request in host.names("Restore")] == [a[0].model_id]
    assert [request.model_id for request in host.names("Load")] == [a[0].model_id, b[0].model_id]
    here = await status(mesh, a)
    assert (here.residency, here.fully_loaded, here.active_lens_id) == (pb.RESIDENCY_DEVICE, True, a[1])
    assert (await mesh.get(a[0].model_id)).status == READY
    events = [(name, data) for name, data in await mesh.events(a[0].id) if name.startswith("group:switch")]
    assert [name for name, _ in events] == ["group:switching", "group:switched"] * 2
    took = [data["seconds"] for name, data in events if name == "group:switched"]
    assert here.estimated_switch_seconds.cross_group == pytest.approx(sum(took) / 2)
    assert all(data["kind"] == "cross" for _, data in events)
    evicted = [data for name, data in await mesh.events(b[0].model_id) if name == "model:evicted"]
    assert [(data["cause"], data["parked"]) for data in evicted] == [("memory", True)]


async def test_a_group_that_comes_back_takes_its_host_memory_until_the_other_has_left(mesh: Mesh) -> None:
    await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    await switched(mesh, b)
    assert leaving((await switched(mesh, a)).plan) == [(b[0].model_id, "memory", False)]
    assert [(await status(mesh, each)).residency for each in (a, b)] == [pb.RESIDENCY_DEVICE, pb.RESIDENCY_DISK]


async def test_beyond_the_limit_of_host_memory_the_oldest_group_goes_to_disk(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b, c = await group(mesh, "a"), await group(mesh, "b"), await group(mesh, "c")
    await switched(mesh, a)
    await switched(mesh, b)
    third = await switched(mesh, c)
    assert leaving(third.plan) == [(a[0].model_id, "park_limit", False), (b[0].model_id, "memory", True)]
    assert [request.model_id for request in host.names("Unload")] == [a[0].model_id]
    found = [(await status(mesh, each)).residency for each in (a, b, c)]
    assert found == [pb.RESIDENCY_DISK, pb.RESIDENCY_PARKED, pb.RESIDENCY_DEVICE]
    device = await mesh.device()
    assert (device.used_bytes, device.reserved_bytes, device.parked_bytes) == (107 * MB, 0, 107 * MB)


@pytest.mark.parametrize("changes", [{"park": 0}, {"refuses_to_park": True}], ids=["no limit left", "host refuses"])
async def test_a_host_without_room_to_park_unloads(mesh: Mesh, changes: dict[str, Any]) -> None:
    host = await add_host(mesh, **changes)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    await switched(mesh, b)
    assert list(host.held) == [b[0].model_id]
    assert (await status(mesh, a)).residency == pb.RESIDENCY_DISK
    assert (await mesh.device()).parked_bytes == 0


async def test_a_parked_group_is_lost_with_its_process(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    await switched(mesh, b)
    host.held.clear()
    host.incarnation = "life-2"
    await mesh.announce(host)
    await mesh.reaches(b[0].model_id, READY)
    assert (await status(mesh, a)).residency == pb.RESIDENCY_DISK
    assert (await mesh.device()).parked_bytes == 0
    await switched(mesh, a)
    assert [request.model_id for request in host.names("Load")] == [x[0].model_id for x in (a, b, b, a)]


async def test_a_lens_that_leaves_its_group_takes_the_parked_copy_along(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    await switched(mesh, b)
    await mesh.groups.DetachLens(pb.DetachLensRequest(group_id=a[0].id, lens_id=a[1]))
    assert list(host.held) == [b[0].model_id]
    assert (await status(mesh, a)).residency == pb.RESIDENCY_DISK


async def test_switches_between_groups_take_turns_between_users_and_can_be_cancelled(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b, c = await group(mesh, "a"), await group(mesh, "b"), await group(mesh, "c")
    host.gate.clear()
    running_now = await switch(mesh, a)
    await eventually(lambda: host.names("Load"))
    second, third = await switch(mesh, b, request_id="r1"), await switch(mesh, c)
    repeated = await switch(mesh, b, request_id="r1")
    assert (repeated.job_id, repeated.position) == (second.job_id, second.position)
    request = pb.SwitchLensRequest(id=c[0].id, lens_id=c[1])
    bob = await GroupServiceStub(mesh.as_user("bob")).SwitchLens(request)
    assert [x.position for x in (running_now, second, third, bob)] == [1, 2, 3, 3]
    cancelled = await mesh.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=second.job_id))
    assert cancelled.status == jobs_pb2.JOB_STATE_CANCELLED
    host.gate.set()
    for each in (running_now, bob, third):
        assert (await mesh.settled(each.job_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    assert [request.model_id for request in host.names("Load")] == [a[0].model_id, c[0].model_id]
    async with mesh.database.connection() as conn:
        order = await conn.fetch("SELECT id FROM jobs WHERE kind = 'group_switch' ORDER BY started_at")
    assert [row["id"] for row in order if row["id"] != second.job_id] == [running_now.job_id, bob.job_id, third.job_id]
    told = [data for name, data in await mesh.events(c[0].id) if name == "group:switching"]
    # The third is overtaken by bob's; the second leaves the queue, and every end brings the others forward.
    assert [x["position"] for x in told if x["task_id"] == third.job_id] == [3, 4, 3, 2]
    assert [x["position"] for x in told if x["task_id"] == bob.job_id] == [3, 2]


async def test_a_load_that_is_cancelled_while_it_makes_room_does_not_begin(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    host.gate.clear()
    started = await mesh.load(b[0].model_id)
    await eventually(lambda: host.names("Park"))
    await mesh.cancel(started.task_id)
    host.gate.set()
    assert (await mesh.settled(started.task_id)).status == jobs_pb2.JOB_STATE_CANCELLED
    assert [request.model_id for request in host.names("Load")] == [a[0].model_id]
    device = await mesh.device()
    assert (device.used_bytes, device.reserved_bytes, device.parked_bytes) == (0, 0, 107 * MB)
    await switched(mesh, a)
    assert (await status(mesh, a)).fully_loaded


async def test_a_load_that_is_cancelled_while_its_model_is_moved_back_is_not_ready(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    await switched(mesh, b)
    await mesh.models.UnloadModel(models_pb2.UnloadModelRequest(id=b[0].model_id))
    host.gate.clear()
    started = await mesh.load(a[0].model_id)
    await eventually(lambda: host.names("Restore"))
    await mesh.cancel(started.task_id)
    host.gate.set()
    assert (await mesh.settled(started.task_id)).status == jobs_pb2.JOB_STATE_CANCELLED
    assert (await mesh.get(a[0].model_id)).status == UNLOADED
    await mesh.beat(host)
    assert (host.held, await mesh.ledger()) == ({}, (0, 0))


async def test_a_switch_that_fits_nowhere_is_refused_and_nothing_moves(mesh: Mesh) -> None:
    host = await add_host(mesh, budget=105 * MB)
    a = await group(mesh, "a")
    failure = await refused(switch(mesh, a))
    assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "INSUFFICIENT_MEMORY")
    assert not host.names("Load")


async def test_groups_share_a_source_and_it_moves_only_when_neither_needs_it(mesh: Mesh) -> None:
    host = await add_host(mesh, budget=345 * MB, park=400 * MB)
    host.sizes |= {"d": 200 * MB}
    source = await mesh.create("c")
    a, b = await reading(mesh, "a", source.id), await reading(mesh, "b", source.id)
    await switched(mesh, a)
    assert set(host.held) == {a[0].model_id, source.id}
    (attached,) = host.names("AttachLens")
    assert attached.lens.activation_source_model_id == source.id
    await switched(mesh, b)
    assert [request.model_id for request in host.names("Load")].count(source.id) == 1
    assert not host.names("Park")
    large = await mesh.create("d")
    plan = (await mesh.load(large.id, validate_only=True)).plan
    assert leaving(plan) == [(a[0].model_id, "memory", True), (b[0].model_id, "memory", True)]
    await mesh.load(large.id)
    await mesh.reaches(large.id, READY)
    assert not host.held[source.id].parked
    await switched(mesh, a)
    here = await status(mesh, a)
    assert (here.residency, here.fully_loaded) == (pb.RESIDENCY_DEVICE, True)


async def test_a_switch_plans_for_the_source_and_brings_it(mesh: Mesh) -> None:
    host = await add_host(mesh, budget=235 * MB, park=400 * MB)
    source = await mesh.create("c")
    a, b = await group(mesh, "a"), await reading(mesh, "b", source.id)
    await switched(mesh, a)
    plan = (await switch(mesh, b, validate_only=True)).plan
    assert leaving(plan) == [(a[0].model_id, "memory", True)]
    await switched(mesh, b)
    assert [request.model_id for request in host.names("Park")] == [a[0].model_id]
    assert {name for name, held in host.held.items() if not held.parked} == {b[0].model_id, source.id}
    assert (await status(mesh, b)).fully_loaded


async def test_an_extension_reads_no_activations(mesh: Mesh) -> None:
    await add_host(mesh)
    a, source = await group(mesh, "a"), await mesh.create("c")
    request = pb.AttachLensRequest(
        group_id=a[0].id, kind=types.LENS_KIND_EXTENSION, extension_id="x_1", activation_source_model_id=source.id
    )
    assert (await refused(mesh.groups.AttachLens(request))).fields == ["activation_source_model_id"]


async def test_switches_on_two_devices_run_side_by_side_and_on_one_take_turns(mesh: Mesh) -> None:
    hosts = [await add_host(mesh, host_id=name, accelerator=name) for name in ("left", "right")]
    groups = [await group(mesh, name) for name in "abc"]
    for host in hosts:
        host.gate.clear()
    jobs = [(await switch(mesh, groups[0]))]
    await eventually(lambda: hosts[0].loading + hosts[1].loading == 1)
    jobs.append(await switch(mesh, groups[1]))
    await eventually(lambda: [host.loading for host in hosts] == [1, 1])
    jobs.append(await switch(mesh, groups[2]))
    assert [job.position for job in jobs] == [1, 1, 2]
    for host in hosts:
        host.gate.set()
    for job in jobs:
        assert (await mesh.settled(job.job_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    assert [host.most_loading for host in hosts] == [1, 1]


async def test_a_group_that_wants_a_device_alone_gets_it_and_makes_way(mesh: Mesh) -> None:
    host = await add_host(mesh, budget=1000 * MB, park=1000 * MB)
    model = await mesh.create("a")
    alone = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="a", model_id=model.id, exclusive=True))
    assert alone.exclusive
    other = await group(mesh, "b")
    await switched(mesh, other)
    plan = (await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=alone.id, validate_only=True))).plan
    assert [(e.model_id, e.cause, e.parked) for e in plan.placements[0].evictions] == [
        (other[0].model_id, "exclusive", True)
    ]
    job = await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=alone.id))
    assert (await mesh.settled(job.job_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    assert {name for name, held in host.held.items() if not held.parked} == {model.id}
    evicted = [data for name, data in await mesh.events(other[0].model_id) if name == "model:evicted"]
    assert [(data["cause"], data["parked"]) for data in evicted] == [("exclusive", True)]
    await switched(mesh, other)
    assert {name for name, held in host.held.items() if not held.parked} == {other[0].model_id}


async def preloaded(mesh: Mesh, to: tuple[pb.Group, str], **more: Any) -> jobs_pb2.Job:
    preload = await mesh.groups.PreloadGroup(pb.PreloadGroupRequest(id=to[0].id, **more))
    return await mesh.settled(preload.task_id)


async def test_a_preload_takes_nobodys_place_who_came_lately_but_a_switch_does(mesh: Mesh) -> None:
    """Host memory has room for one group that is parked already."""
    host = await add_host(mesh)
    a, b, c = await group(mesh, "a"), await group(mesh, "b"), await group(mesh, "c")
    await switched(mesh, a)
    await switched(mesh, b)
    job = await preloaded(mesh, c)
    assert (job.status, job.error_code) == (jobs_pb2.JOB_STATE_FAILED, "INSUFFICIENT_MEMORY")
    assert not host.held[b[0].model_id].parked
    assert host.held[a[0].model_id].parked
    await switched(mesh, c)
    assert host.held[b[0].model_id].parked


async def test_a_preload_goes_to_host_memory_where_no_device_has_room(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    await switched(mesh, a)
    job = await preloaded(mesh, b)
    assert (job.status, job.result["residency"], job.result["loaded"]) == (jobs_pb2.JOB_STATE_COMPLETED, "parked", 1)
    assert [(request.model_id, request.parked) for request in host.names("Load")] == [
        (a[0].model_id, False),
        (b[0].model_id, True),
    ]
    assert not host.names("Park")
    assert (await status(mesh, b)).residency == pb.RESIDENCY_PARKED
    assert (await mesh.groups.GetGroup(pb.GetGroupRequest(id=b[0].id))).lenses[0].residency == pb.RESIDENCY_PARKED
    device = await mesh.device()
    assert (device.used_bytes, device.reserved_bytes, device.parked_bytes) == (107 * MB, 0, 107 * MB)
    assert not await mesh.beat(host)
    assert (await mesh.device()).parked_bytes == 107 * MB  # the host agrees
    await switched(mesh, b)
    assert [request.model_id for request in host.names("Restore")] == [b[0].model_id]
    assert len(host.names("Load")) == 2
    here = await status(mesh, b)
    assert (here.residency, here.fully_loaded, here.active_lens_id) == (pb.RESIDENCY_DEVICE, True, b[1])


async def test_a_preload_into_host_memory_leaves_the_device_alone_and_tells_how_far_it_is(mesh: Mesh) -> None:
    host = await add_host(mesh)
    a = await group(mesh, "a")
    job = await preloaded(mesh, a, residency=pb.RESIDENCY_PARKED)
    assert (job.status, job.result["residency"]) == (jobs_pb2.JOB_STATE_COMPLETED, "parked")
    assert await mesh.ledger() == (0, 0)
    assert (await mesh.device()).parked_bytes == 107 * MB
    told = [data for name, data in await mesh.events(a[0].id) if name == "group:preload"]
    assert [(data["progress"], data["residency"]) for data in told] == [
        (percent, "parked") for percent in (12.5, 25, 37.5, 50, 100)
    ]
    again = await preloaded(mesh, a, residency=pb.RESIDENCY_PARKED)
    assert again.result["loaded"] == 1
    assert len(host.names("Load")) == 1
    assert len(host.names("AttachLens")) == 1


async def test_a_preload_into_host_memory_stays_within_its_limit(mesh: Mesh) -> None:
    host = await add_host(mesh, park=104 * MB)
    a, b = await group(mesh, "a"), await group(mesh, "b")
    job = await preloaded(mesh, a, residency=pb.RESIDENCY_PARKED)
    assert (job.status, list(job.result["failed"])) == (jobs_pb2.JOB_STATE_COMPLETED, [a[1]])  # the base alone has room
    job = await preloaded(mesh, b, residency=pb.RESIDENCY_PARKED)
    assert (job.status, job.error_code) == (jobs_pb2.JOB_STATE_FAILED, "INSUFFICIENT_MEMORY")
    assert (await mesh.device()).parked_bytes == 100 * MB
    assert list(host.held) == [a[0].model_id]


async def test_where_host_and_device_share_one_memory_nothing_is_preloaded_into_it(mesh: Mesh) -> None:
    await add_host(mesh, park=0)
    a = await group(mesh, "a")
    request = pb.PreloadGroupRequest(id=a[0].id, residency=pb.RESIDENCY_PARKED)
    failure = await refused(mesh.groups.PreloadGroup(request))
    assert (failure.code, failure.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    request = pb.PreloadGroupRequest(id=a[0].id, residency=pb.RESIDENCY_DISK)
    assert (await refused(mesh.groups.PreloadGroup(request))).fields == ["residency"]


@pytest.mark.parametrize("how", ["fails", "cancelled"])
async def test_a_preload_into_host_memory_that_does_not_end_well_leaves_nothing(mesh: Mesh, how: str) -> None:
    host = await add_host(mesh)
    a = await group(mesh, "a")
    if how == "fails":
        host.load_errors.append(errors.Failed("truncated", reason="MODEL_LOAD_FAILED"))
        job = await preloaded(mesh, a, residency=pb.RESIDENCY_PARKED)
        assert (job.status, job.error_code) == (jobs_pb2.JOB_STATE_FAILED, "MODEL_LOAD_FAILED")
    else:
        host.gate.clear()
        preload = await mesh.groups.PreloadGroup(pb.PreloadGroupRequest(id=a[0].id, residency=pb.RESIDENCY_PARKED))
        await eventually(lambda: host.loading)
        assert (await mesh.device()).parked_bytes == 100 * MB  # promised
        await mesh.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=preload.task_id))
        assert (await mesh.settled(preload.task_id)).status == jobs_pb2.JOB_STATE_CANCELLED
        host.gate.set()
    assert (await mesh.device()).parked_bytes == 0
    assert (await status(mesh, a)).residency == pb.RESIDENCY_DISK
    await switched(mesh, a)


async def test_preloads_that_wait_leave_room_for_the_load_that_they_wait_for(mesh: Mesh) -> None:
    await add_host(mesh)
    model = await mesh.create("a")
    request = pb.CreateGroupRequest(name="g", model_id=model.id)
    groups = [await mesh.groups.CreateGroup(request) for _ in range(mesh.part.slots + 1)]
    jobs = [(await mesh.groups.PreloadGroup(pb.PreloadGroupRequest(id=each.id))).task_id for each in groups]
    for job_id in jobs:
        assert (await mesh.settled(job_id)).status == jobs_pb2.JOB_STATE_COMPLETED


async def test_a_hot_group_gets_a_copy_with_its_lenses_on_an_idle_device(
    database: Database, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENSMESH_DUPLICATE_AT", "2")
    async with running(database, tmp_path, nats_url) as mesh:
        left, right = [await add_host(mesh, host_id=name, device=name) for name in ("cuda:0", "cuda:1")]
        made, lens_id = await group(mesh, "a")
        await switched(mesh, (made, lens_id))
        hot, idle = (left, right) if left.held else (right, left)
        hot.held[made.model_id].leases = 1
        await mesh.beat(hot)
        assert not idle.names("Load")
        hot.held[made.model_id].leases = 2
        await mesh.beat(hot)
        await eventually(lambda: made.model_id in idle.held and len(idle.held[made.model_id].lenses) == 1)
        assert idle.held[made.model_id].lenses[0].lens_id == lens_id
        assert (await mesh.get(made.model_id)).device == f"{hot.host_id}/{hot.device}"
