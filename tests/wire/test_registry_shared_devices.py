"""A device as a whole: processes that share it have one ledger, other programs are in it, and it never fills up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lensmesh.registry.v1 import devices_pb2, models_pb2

from services.kit.database import Database
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


async def test_processes_of_one_device_have_one_ledger(mesh: Mesh) -> None:
    """Each may use 150 MB of a device of 300 MB; together they may hold 80 % of it."""
    sizes = {"a": 130 * MB, "b": 130 * MB, "c": 80 * MB}
    one = await mesh.add_host(FakeHost(sizes=sizes, budget=150 * MB, accelerator="GPU-1", device="cuda:0"))
    two = FakeHost(host_id="device-1", sizes=sizes, budget=150 * MB, accelerator="GPU-1", device="cuda:0")
    await mesh.add_host(two)
    a, b, c = [await mesh.create(name) for name in "abc"]
    await mesh.load(a.id, device="device-0")
    await mesh.reaches(a.id, READY)
    failure = await refused(mesh.load(b.id, device="device-1"))
    assert failure.reason == "INSUFFICIENT_MEMORY"
    assert failure.facts["available_memory_gb"] == "0.11"
    await mesh.load(c.id, device="device-1")
    await mesh.reaches(c.id, READY)
    assert (set(one.held), set(two.held)) == ({a.id}, {c.id})
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
