"""Bytes that jobs reserve beside models: idle models make room for them, and who wants a device alone is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from lensmesh.registry.v1 import devices_pb2, models_pb2
from lensmesh.registry.v1 import groups_pb2 as pb

from services.kit.database import Database
from services.residency.hosts import Hosts
from tests.support import eventually
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running

UNLOADED, READY = models_pb2.MODEL_STATUS_UNLOADED, models_pb2.MODEL_STATUS_READY


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def gpus(mesh: Mesh, count: int = 2, **changes: Any) -> list[FakeHost]:
    """GPUs of 200 MB with room to park 100 MB each."""
    facts = {"device": "cuda:0", "budget": 200 * MB, "park": 100 * MB, "sizes": dict.fromkeys("ab", 90 * MB), **changes}
    return [
        await mesh.add_host(FakeHost(host_id=f"gpu-{number}", accelerator=f"GPU-{number}", **facts))
        for number in range(count)
    ]


async def loaded(mesh: Mesh, name: str, device: str, **more: Any) -> str:
    model = await mesh.create(name, **more)
    await mesh.load(model.id, device=device)
    await mesh.reaches(model.id, READY)
    return model.id


def reserve(mesh: Mesh, size: int, ranks: int = 1, *model_ids: str) -> Any:
    request = {"host_id": "gpu-0", "owner": "job_1", "bytes": size * MB, "ranks": ranks, "model_ids": model_ids}
    return mesh.placement.Reserve(devices_pb2.ReserveRequest(**request))


async def ledgers(mesh: Mesh, count: int = 2) -> list[tuple[int, int]]:
    found = [await mesh.ledger(f"gpu-{number}") for number in range(count)]
    return [(used // MB, reserved // MB) for used, reserved in found]


async def test_a_gang_parks_what_is_idle_on_its_devices_and_brings_nothing_back(mesh: Mesh) -> None:
    hosts = await gpus(mesh)
    models = [await loaded(mesh, "a", "gpu-0"), await loaded(mesh, "b", "gpu-1")]
    assert list((await reserve(mesh, 100, 2)).devices) == ["GPU-0", "GPU-1"]  # there is room beside them
    assert await ledgers(mesh) == [(90, 100), (90, 100)]
    assert list((await reserve(mesh, 150, 2)).devices) == ["GPU-0", "GPU-1"]
    assert await ledgers(mesh) == [(0, 150), (0, 150)]
    assert [host.held[model].parked for host, model in zip(hosts, models, strict=True)] == [True, True]
    told = [data for name, data in await mesh.events(models[1]) if name == "model:evicted"]
    assert [(data["cause"], data["parked"]) for data in told] == [("memory", True)]
    await mesh.placement.Release(devices_pb2.ReleaseRequest(host_id="gpu-0", owner="job_1"))
    assert await ledgers(mesh) == [(0, 0), (0, 0)]
    for host in hosts:
        await mesh.beat(host)
    assert [(await mesh.get(model)).status for model in models] == [UNLOADED, UNLOADED]
    assert not any(host.names("Restore") for host in hosts)


async def test_where_one_device_of_a_gang_has_no_room_nothing_leaves_any(mesh: Mesh) -> None:
    hosts = await gpus(mesh)
    a = await loaded(mesh, "a", "gpu-0")
    b = await loaded(mesh, "b", "gpu-1", pinned=True)
    failure = await refused(reserve(mesh, 150, 2))
    assert (failure.reason, failure.facts["device"]) == ("INSUFFICIENT_MEMORY", "gpu-1/cuda:0")
    assert failure.facts["available_memory_gb"] == "0.11"
    assert await ledgers(mesh) == [(90, 0), (90, 0)]
    assert not any(host.held[model].parked for host, model in zip(hosts, (a, b), strict=True))


async def test_a_gang_prefers_devices_where_nobody_has_to_leave(mesh: Mesh) -> None:
    hosts = await gpus(mesh, 3)
    await loaded(mesh, "a", "gpu-1")
    assert list((await reserve(mesh, 150, 2)).devices) == ["GPU-0", "GPU-2"]
    assert not hosts[1].names("Park")


async def test_a_job_keeps_the_models_that_it_works_with(mesh: Mesh) -> None:
    (host,) = await gpus(mesh, 1)
    model = await loaded(mesh, "a", "gpu-0")
    assert (await refused(reserve(mesh, 150, 1, model))).reason == "INSUFFICIENT_MEMORY"
    await reserve(mesh, 110, 1, model)
    assert not host.held[model].parked
    await reserve(mesh, 150)
    assert host.held[model].parked


async def test_models_of_another_process_of_the_device_make_room_too(mesh: Mesh) -> None:
    facts = {"accelerator": "GPU-0", "device": "cuda:0", "budget": 200 * MB, "sizes": {"a": 150 * MB}}
    await mesh.add_host(FakeHost(host_id="gpu-0", **facts))
    other = await mesh.add_host(FakeHost(host_id="gpu-1", **facts))
    model = await loaded(mesh, "a", "gpu-1")
    await reserve(mesh, 190)
    assert await ledgers(mesh) == [(0, 190), (0, 0)]
    assert (other.held, (await mesh.get(model)).status) == ({}, UNLOADED)


async def test_what_came_into_use_meanwhile_stays_and_another_one_leaves(mesh: Mesh) -> None:
    (host,) = await gpus(mesh, 1, sizes=dict.fromkeys("ab", 80 * MB))
    a, b = await loaded(mesh, "a", "gpu-0"), await loaded(mesh, "b", "gpu-0")
    host.held[a].leases = 1  # no heartbeat has told
    await reserve(mesh, 120)
    assert [(host.held[model].parked) for model in (a, b)] == [False, True]
    assert await ledgers(mesh, 1) == [(80, 120)]
    assert (await refused(reserve(mesh, 130))).reason == "INSUFFICIENT_MEMORY"
    assert await ledgers(mesh, 1) == [(80, 120)]


async def test_a_job_that_gives_up_while_room_is_made_holds_nothing(mesh: Mesh) -> None:
    (host,) = await gpus(mesh, 1)
    model = await loaded(mesh, "a", "gpu-0")
    host.gate.clear()
    call = reserve(mesh, 150)
    await eventually(lambda: host.names("Park"))
    call.cancel()
    host.gate.set()

    async def settled() -> bool:
        return await ledgers(mesh, 1) == [(0, 0)]

    await eventually(settled)
    assert host.held[model].parked
    assert [each.model_id for each in (await mesh.device("gpu-0")).parked_models] == [model]


async def test_a_job_waits_for_who_wants_the_device_alone_and_says_so(mesh: Mesh) -> None:
    (host,) = await gpus(mesh, 1)
    model = await loaded(mesh, "a", "gpu-0")
    await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="a", model_id=model, exclusive=True))
    host.held[model].leases = 1
    await mesh.beat(host)
    failure = await refused(reserve(mesh, 10))
    assert (failure.code, failure.reason, failure.facts["model_id"]) == ("FAILED_PRECONDITION", "IN_USE", model)
    assert (await refused(reserve(mesh, 201))).reason == "INSUFFICIENT_MEMORY"  # nobody's leaving would help
    told: list[str | None] = []

    async def waiting(reason: str | None) -> None:
        told.append(reason)

    ledger = Hosts(mesh.internal, grpc.aio.insecure_channel, "gpu-0")
    job = asyncio.create_task(ledger.reserve("job_1", 10 * MB, waiting=waiting))
    await eventually(lambda: told)
    assert await ledgers(mesh, 1) == [(90, 0)]
    host.held[model].leases = 0
    assert await job == ["GPU-0"]
    assert told[-1] is None
    assert set(told[:-1]) == {f"gpu-0/cuda:0 is not to be shared, and {model} may not leave"}
    assert await ledgers(mesh, 1) == [(0, 10)]
    assert host.held[model].parked


async def test_a_job_on_the_model_that_wants_the_device_alone_needs_not_wait(mesh: Mesh) -> None:
    (host,) = await gpus(mesh, 1)
    model = await loaded(mesh, "a", "gpu-0")
    await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="a", model_id=model, exclusive=True))
    host.held[model].leases = 1
    await mesh.beat(host)
    await reserve(mesh, 10, 1, model)
    assert await ledgers(mesh, 1) == [(90, 10)]


async def test_ranks_on_a_cpu_are_spread_over_its_processes_before_anybody_has_to_leave(mesh: Mesh) -> None:
    for number in range(2):
        await mesh.add_host(FakeHost(host_id=f"gpu-{number}", budget=200 * MB, sizes={"a": 60 * MB}))
    model = await loaded(mesh, "a", "gpu-0")
    assert list((await reserve(mesh, 90, 2)).devices) == ["cpu", "cpu"]
    assert await ledgers(mesh) == [(60, 90), (0, 90)]
    assert list((await reserve(mesh, 150, 2)).devices) == ["cpu", "cpu"]  # as much as both have together
    assert await ledgers(mesh) == [(0, 150), (0, 150)]
    assert (await mesh.get(model)).status == UNLOADED
