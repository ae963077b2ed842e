"""A device as a whole: processes that share it have one ledger, other programs are in it, and it never fills up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import devices_pb2, jobs_pb2, models_pb2

from services.kit.database import Database
from tests.support import eventually
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running

UNLOADED, READY = models_pb2.MODEL_STATUS_UNLOADED, models_pb2.MODEL_STATUS_READY


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def measured(mesh: Mesh, host: FakeHost, device_used: int, own: int) -> None:
    """A heartbeat with what was measured."""
    request = devices_pb2.HeartbeatRequest(
        host_id=host.host_id,
        incarnation=host.incarnation,
        models=host.held.values(),
        device_used_bytes=device_used,
        process_bytes=own,
    )
    await mesh.placement.Heartbeat(request)


async def two_processes(mesh: Mesh, **changes: Any) -> list[FakeHost]:
    """Of one device of 300 MB, of which each may use 150 MB and both together 240 MB."""
    sizes = {"a": 130 * MB, "b": 130 * MB, "c": 80 * MB}
    facts = {"sizes": sizes, "budget": 150 * MB, "accelerator": "GPU-1", "device": "cuda:0", **changes}
    return [await mesh.add_host(FakeHost(host_id=f"device-{number}", **facts)) for number in range(2)]


def leaving(plan: types.LoadPlan) -> list[tuple[str, str, str, bool]]:
    return [(e.host_id, e.model_id, e.cause, e.parked) for e in plan.placements[0].evictions]


async def test_a_load_sends_idle_models_of_another_process_of_the_device_away_as_its_plan_says(mesh: Mesh) -> None:
    one, two = await two_processes(mesh, park=130 * MB)
    a, b = [await mesh.create(name) for name in "ab"]
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    planned = await mesh.load(b.id, device="device-1", validate_only=True)
    assert leaving(planned.plan) == [("device-0", a.id, "memory", True)]
    assert not one.names("Park")
    two.gate.clear()
    loading = await mesh.load(b.id, device="device-1")
    assert leaving(loading.plan) == leaving(planned.plan)
    await eventually(lambda: two.loading)
    assert [request.model_id for request in one.names("Park")] == [a.id]
    assert [await mesh.ledger(each.host_id) for each in (one, two)] == [(0, 0), (0, 140 * MB)]
    two.gate.set()
    await mesh.reaches(b.id, READY)
    assert (await mesh.get(a.id)).status == UNLOADED
    assert (set(two.held), one.held[a.id].parked) == ({b.id}, True)
    assert [await mesh.ledger(each.host_id) for each in (one, two)] == [(0, 0), (130 * MB, 0)]
    assert (await mesh.device("device-0")).parked_bytes == 130 * MB
    told = [data for name, data in await mesh.events(a.id) if name == "model:evicted"]
    assert [(data["device"], data["cause"], data["parked"]) for data in told] == [("device-0/cuda:0", "memory", True)]
    assert not await mesh.beat(one)
    assert (await mesh.device("device-0")).parked_bytes == 130 * MB  # and its host agrees


async def test_what_came_into_use_in_another_process_stays_and_the_load_is_refused(mesh: Mesh) -> None:
    """The registry hears of the lease from the host that is to unload it, after it has planned."""
    one, _ = await two_processes(mesh)
    a, b = [await mesh.create(name) for name in "ab"]
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    one.held[a.id].leases = 1
    await mesh.load(b.id, device="device-1")
    failed = await mesh.reaches(b.id, models_pb2.MODEL_STATUS_FAILED)
    assert failed.error_code == "INSUFFICIENT_MEMORY"
    assert (await mesh.get(a.id)).status == READY
    assert [await mesh.ledger(f"device-{number}") for number in range(2)] == [(130 * MB, 0), (0, 0)]


async def test_a_pinned_model_of_another_process_stays(mesh: Mesh) -> None:
    await two_processes(mesh)
    a, b = await mesh.create("a", pinned=True), await mesh.create("b")
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    assert (await refused(mesh.load(b.id, device="device-1"))).reason == "INSUFFICIENT_MEMORY"


async def test_a_model_that_moves_to_another_process_of_its_device_makes_room_for_itself(mesh: Mesh) -> None:
    one, two = await two_processes(mesh)
    a = await mesh.create("a")
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    moved = await mesh.models.MoveModel(models_pb2.MoveModelRequest(id=a.id, device="device-1"))
    assert (await mesh.settled(moved.task_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    assert (set(one.held), set(two.held)) == (set(), {a.id})
    found = await mesh.get(a.id)
    assert (found.status, found.device) == (READY, "device-1/cuda:0")
    two.held.clear()
    two.incarnation = "life-2"
    await mesh.announce(two)
    await eventually(lambda: a.id in two.held or a.id in one.held)  # it is wanted still


async def test_processes_of_one_device_have_one_ledger(mesh: Mesh) -> None:
    """Each may use 150 MB of a device of 300 MB; together they may hold 80 % of it."""
    one, two = await two_processes(mesh)
    a, b, c = [await mesh.create(name) for name in "abc"]
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    one.held[a.id].leases = 1
    await mesh.beat(one)
    failure = await refused(mesh.load(b.id, device="device-1"))
    assert failure.reason == "INSUFFICIENT_MEMORY"
    assert failure.facts["available_memory_gb"] == "0.11"
    await mesh.load(c.id, device="device-1")
    await mesh.reaches(c.id, READY)
    assert (set(one.held), set(two.held)) == ({a.id}, {c.id})
    two.held[c.id].leases = 1
    await mesh.beat(two)
    reserve = devices_pb2.ReserveRequest(host_id="device-0", owner="job", bytes=20 * MB)
    await mesh.placement.Reserve(reserve)
    reserve = devices_pb2.ReserveRequest(host_id="device-1", owner="other", bytes=11 * MB)
    assert (await refused(mesh.placement.Reserve(reserve))).reason == "INSUFFICIENT_MEMORY"


async def test_processes_of_different_devices_do_not_share(mesh: Mesh) -> None:
    sizes = {"a": 130 * MB, "b": 130 * MB}
    for number in range(2):
        host = FakeHost(host_id=f"device-{number}", sizes=sizes, budget=150 * MB, device="cuda:0")
        host.accelerator = f"GPU-{number}"
        await mesh.add_host(host)
    for number, name in enumerate("ab"):
        model = await mesh.create(name)
        await mesh.load(model.id, device=f"device-{number}")
        await mesh.reaches(model.id, READY)


async def test_what_other_programs_hold_is_nobodys_to_plan_with(mesh: Mesh) -> None:
    """The device has 400 MB, of which 200 MB are ours to use."""
    host = await mesh.add_host(FakeHost(sizes={"a": 130 * MB}, budget=200 * MB))
    model = await mesh.create("a")
    await measured(mesh, host, 300 * MB, 10 * MB)
    assert (await mesh.device()).external_bytes == 290 * MB
    assert (await refused(mesh.load(model.id))).reason == "INSUFFICIENT_MEMORY"
    await measured(mesh, host, 230 * MB, 10 * MB)
    await mesh.load(model.id)
    await mesh.reaches(model.id, READY)


async def test_a_device_that_is_nearly_full_parks_what_was_idle_longest_one_for_each_measurement(mesh: Mesh) -> None:
    host = FakeHost(sizes={"a": 50 * MB, "b": 50 * MB, "c": 50 * MB}, budget=200 * MB, park=60 * MB, device="cuda:0")
    await mesh.add_host(host)
    a, b, c = [await mesh.create(name) for name in "abc"]
    for model in (a, b, c):
        await mesh.load(model.id)
        await mesh.reaches(model.id, READY)
    host.held[a.id].leases = 1
    await measured(mesh, host, 361 * MB, 361 * MB)
    await mesh.reaches(b.id, UNLOADED)
    assert [request.model_id for request in host.names("Park")] == [b.id]
    assert (await mesh.get(c.id)).status == READY
    await measured(mesh, host, 361 * MB, 361 * MB)
    await mesh.reaches(c.id, UNLOADED)
    assert [request.model_id for request in host.names("Unload")] == [c.id]
    assert (await mesh.get(a.id)).status == READY
    told = [data for name, data in await mesh.events(b.id) if name == "model:evicted"]
    assert [(data["cause"], data["parked"]) for data in told] == [("pressure", True)]
    device = await mesh.device()
    assert (device.used_bytes, device.parked_bytes) == (50 * MB, 50 * MB)


async def test_a_pinned_model_is_loaded_anew_in_another_process_once_it_has_left(mesh: Mesh) -> None:
    one, two = await two_processes(mesh)
    a = await mesh.create("a", pinned=True)
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    await mesh.load(a.id, device="device-1", quantization=types.QUANTIZATION_INT8)
    await mesh.reaches(a.id, READY)
    assert (set(one.held), set(two.held)) == (set(), {a.id})


async def test_of_a_device_that_is_nearly_full_one_model_leaves_whichever_process_measures_it(mesh: Mesh) -> None:
    one, two = await two_processes(mesh, sizes=dict.fromkeys("abc", 50 * MB))
    a, b, c = [await mesh.create(name) for name in "abc"]
    for model, device in ((a, "device-1"), (b, "device-0"), (c, "device-1")):
        await mesh.load(model.id, device=device)
        await mesh.reaches(model.id, READY)
    for held in (*one.held.values(), *two.held.values()):
        held.idle_seconds = 100.0  # heartbeats are no use of them
    await measured(mesh, one, 280 * MB, 50 * MB)
    await measured(mesh, two, 280 * MB, 100 * MB)
    await mesh.reaches(a.id, UNLOADED)
    assert [(await mesh.get(model.id)).status for model in (b, c)] == [READY, READY]
    await measured(mesh, one, 280 * MB, 50 * MB)
    await mesh.reaches(b.id, UNLOADED)
    assert (await mesh.get(c.id)).status == READY


async def test_where_a_process_runs_out_of_memory_the_others_of_its_device_make_room_too(mesh: Mesh) -> None:
    one, two = await two_processes(mesh)
    a, c = await mesh.create("a"), await mesh.create("c")
    for model, device in ((a, "device-0"), (c, "device-1")):
        await mesh.load(model.id, device=device)
        await mesh.reaches(model.id, READY)
    await mesh.placement.MakeRoom(devices_pb2.MakeRoomRequest(host_id="device-0", model_ids=[a.id]))
    assert (set(one.held), set(two.held)) == ({a.id}, set())
