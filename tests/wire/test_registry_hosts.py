"""Host processes come, go silent, die and come back; the rows follow what they really hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import devices_pb2, groups_pb2, jobs_pb2
from lensmesh.registry.v1 import models_pb2 as pb

from services.kit import errors
from services.kit.database import Database
from services.registry.domain import ALONE
from services.registry.operations.loading import ensure_resident, load_on
from tests.support import eventually
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running

READY, FAILED, LOADING, UNLOADED = (
    pb.MODEL_STATUS_READY,
    pb.MODEL_STATUS_FAILED,
    pb.MODEL_STATUS_LOADING,
    pb.MODEL_STATUS_UNLOADED,
)


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


@pytest.fixture
async def host(mesh: Mesh) -> FakeHost:
    return await mesh.add_host(FakeHost(sizes={"tiny": 100 * MB, "other": 100 * MB}))


async def silence(mesh: Mesh, host: FakeHost) -> None:
    """Nothing was heard of the host for longer than the timeout, by the database's clock."""
    async with mesh.database.connection() as conn:
        await conn.execute(
            "UPDATE hosts SET heartbeat_at = heartbeat_at - interval '1 minute' WHERE host_id = $1", host.host_id
        )


async def lost(mesh: Mesh, host: FakeHost) -> None:
    await silence(mesh, host)

    async def dead() -> bool:
        return not (await mesh.device(host.host_id)).alive

    await eventually(dead)


async def test_models_of_a_silent_host_are_no_longer_ready(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    await lost(mesh, host)
    unloaded = await mesh.reaches(model.id, UNLOADED)
    assert not unloaded.HasField("device")
    name, data = (await mesh.events(model.id))[-1]
    assert (name, data["cause"]) == ("model:unloaded", "host_lost")
    located = devices_pb2.LocateModelRequest(model_id=model.id)
    assert (await refused(mesh.placement.LocateModel(located))).reason == "WRONG_STATE"
    ensure = devices_pb2.EnsureResidentRequest(host_id=host.host_id, model_id=model.id)
    assert (await refused(mesh.placement.EnsureResident(ensure))).reason == "NO_HOST"
    assert (await refused(mesh.load(model.id))).reason == "NO_HOST"


async def test_the_same_process_that_is_heard_again_brings_its_models_back(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    await lost(mesh, host)
    await mesh.reaches(model.id, UNLOADED)
    assert await mesh.beat(host) is True  # it has to register again
    await mesh.announce(host)
    back = await mesh.get(model.id)
    assert (back.status, back.memory_usage_bytes, back.device) == (READY, 100 * MB, "device-0/cpu")
    assert len(host.names("Load")) == 1
    assert await mesh.ledger() == (100 * MB, 0)


async def test_a_process_that_died_gets_its_wanted_models_loaded_again(mesh: Mesh, host: FakeHost) -> None:
    wanted, given_up = await mesh.ready("tiny"), await mesh.ready("other")
    await mesh.placement.Reserve(devices_pb2.ReserveRequest(host_id="device-0", owner="job_1", bytes=50 * MB))
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=given_up.id))
    host.held.clear()
    host.incarnation = "life-2"
    assert await mesh.beat(host) is True
    await mesh.announce(host)
    await mesh.reaches(wanted.id, READY)
    await eventually(lambda: set(host.held) == {wanted.id})
    assert (await mesh.get(given_up.id)).status == UNLOADED
    assert await mesh.ledger() == (100 * MB, 0)  # the dead process's reservation is gone
    names = [name for name, _ in await mesh.events(wanted.id)]
    assert names.count("model:unloaded") == 1
    assert names[-1] == "model:ready"


async def test_a_refused_unload_changes_nothing_of_what_is_wanted(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.held[model.id].leases = 1
    assert (await refused(mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id)))).reason == "IN_USE"
    host.held.clear()
    host.incarnation = "life-2"
    await mesh.announce(host)
    await mesh.reaches(model.id, READY)
    assert len(host.names("Load")) == 2


async def test_a_host_that_dies_in_the_middle_of_a_load_gets_it_again(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.gate.clear()
    await mesh.load(model.id)
    await eventually(lambda: host.loading)
    await mesh.stop_host(host)
    host.gate.set()
    reborn = FakeHost(incarnation="life-2", sizes=host.sizes)
    await mesh.add_host(reborn)
    await mesh.reaches(model.id, READY)
    assert set(reborn.held) == {model.id}
    assert await mesh.ledger() == (100 * MB, 0)


async def test_a_load_whose_host_stays_away_fails_and_gives_its_place_back(mesh: Mesh, host: FakeHost) -> None:
    await mesh.add_host(FakeHost(host_id="small", device="cuda:0", budget=1 * MB))
    model = await mesh.create()
    host.gate.clear()
    await mesh.load(model.id, device="cpu")
    await eventually(lambda: host.loading)
    await mesh.stop_host(host)
    failed = await mesh.reaches(model.id, FAILED)
    assert failed.error_code == "UNAVAILABLE"
    assert await mesh.ledger() == (0, 0)


async def test_a_report_that_is_older_than_the_rows_is_not_believed(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    late = devices_pb2.HeartbeatRequest(host_id=host.host_id, incarnation=host.incarnation, models=[], used_bytes=1)
    await mesh.placement.Heartbeat(late)  # written before the load ended
    assert (await mesh.get(model.id)).status == READY
    host.held.clear()
    await mesh.beat(host)  # and this one is true: the host dropped it
    assert (await mesh.get(model.id)).status in (UNLOADED, LOADING)
    await mesh.reaches(model.id, READY)  # wanted, so it comes back


async def test_a_heartbeat_tells_leases_uses_and_measured_bytes(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.held[model.id].leases = 3
    host.held[model.id].idle_seconds = 0.0
    host.held[model.id].memory_bytes = 111 * MB
    await mesh.beat(host)
    device = await mesh.device()
    assert [(m.leases, m.memory_bytes) for m in device.models] == [(3, 111 * MB)]
    assert device.used_bytes == 111 * MB
    assert (await mesh.get(model.id)).HasField("last_used_at")


async def test_a_model_that_no_row_knows_is_taken_off_its_host(mesh: Mesh, host: FakeHost) -> None:
    stray = devices_pb2.HostedModel(model_id="m_deleted", quantization=types.QUANTIZATION_NONE, memory_bytes=5)
    host.held["m_deleted"] = stray
    await mesh.beat(host)
    assert host.held == {}
    unwanted = await mesh.create()
    host.held[unwanted.id] = devices_pb2.HostedModel(
        model_id=unwanted.id, quantization=types.QUANTIZATION_NONE, memory_bytes=5
    )
    await mesh.beat(host)
    assert host.held == {}


async def test_a_registry_that_dies_in_the_middle_of_a_load_finishes_it_after_its_restart(
    database: Database, tmp_path: Path, nats_url: str
) -> None:
    host = FakeHost()
    async with running(database, tmp_path, nats_url, worker=False) as mesh:
        await mesh.add_host(host)
        model = await mesh.create()
        started = await mesh.load(model.id)
        claimed = await mesh.context.jobs.claim(["model_load"], "", "a registry that dies", {})
        assert claimed is not None
        assert (await mesh.get(model.id)).status == LOADING
    async with database.connection() as conn:  # killed: nobody renews the lease
        await conn.execute("UPDATE jobs SET lease_until = clock_timestamp() - interval '1 second'")
    async with running(database, tmp_path, nats_url) as mesh:
        await mesh.add_host(host)
        await mesh.reaches(model.id, READY)
        assert (await mesh.settled(started.task_id)).attempt == 2
        assert await mesh.ledger() == (100 * MB, 0)


async def test_a_load_that_ended_while_the_registry_was_away_is_adopted(
    database: Database, tmp_path: Path, nats_url: str
) -> None:
    host = FakeHost()
    async with running(database, tmp_path, nats_url, worker=False) as mesh:
        await mesh.add_host(host)
        model = await mesh.create()
        await mesh.load(model.id)
        async with database.connection() as conn:
            await conn.execute("UPDATE jobs SET state = 'failed', error_code = 'STALE_LEASE', error_message = 'gone'")
        failed = await mesh.reaches(model.id, FAILED)  # nobody settled it: the next round does
        assert (failed.error_code, await mesh.ledger()) == ("STALE_LEASE", (0, 0))
        host.held[model.id] = devices_pb2.HostedModel(
            model_id=model.id, quantization=types.QUANTIZATION_NONE, memory_bytes=100 * MB, fingerprint="fp"
        )
        await mesh.beat(host)
        assert (await mesh.get(model.id)).status == READY
        assert await mesh.ledger() == (100 * MB, 0)


async def test_models_marked_for_preload_are_loaded_when_the_mesh_starts(
    database: Database, tmp_path: Path, nats_url: str
) -> None:
    async with running(database, tmp_path, nats_url) as mesh:
        host = await mesh.add_host(FakeHost(sizes={"tiny": 100 * MB, "other": 100 * MB}))
        preloaded, plain = await mesh.create("tiny", preload=True), await mesh.ready("other")
        await silence(mesh, host)
    async with running(database, tmp_path, nats_url) as mesh:
        again = await mesh.add_host(FakeHost(incarnation="life-2", sizes=host.sizes))
        await mesh.reaches(preloaded.id, READY)
        await mesh.reaches(plain.id, UNLOADED)
        assert set(again.held) == {preloaded.id}


async def test_a_setting_names_models_and_groups_to_load_at_start(
    database: Database, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, tmp_path, nats_url) as mesh:
        host = await mesh.add_host(FakeHost(sizes={"tiny": 100 * MB, "other": 100 * MB}))
        alone, base = await mesh.create("tiny"), await mesh.create("other")
        group = await mesh.groups.CreateGroup(groups_pb2.CreateGroupRequest(name="g", model_id=base.id))
        lens = await mesh.groups.AttachLens(
            groups_pb2.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_LOGIT_LENS)
        )
    monkeypatch.setenv("LENSMESH_PRELOAD", f"{alone.id},{group.id},m_unknown")
    async with running(database, tmp_path, nats_url) as mesh:
        again = await mesh.add_host(FakeHost(incarnation="life-2", sizes=host.sizes))
        for model in (alone, base):
            await mesh.reaches(model.id, READY)
        await eventually(lambda: [each.lens_id for each in again.held[base.id].lenses] == [lens.id])


async def test_a_failed_load_can_be_retried_by_its_job(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.load_errors = [errors.Failed("truncated", reason="MODEL_LOAD_FAILED")]
    started = await mesh.load(model.id)
    await mesh.reaches(model.id, FAILED)
    await mesh.settled(started.task_id)
    await mesh.jobs.RetryJob(jobs_pb2.RetryJobRequest(id=started.task_id))
    await mesh.reaches(model.id, READY)
    assert await mesh.ledger() == (100 * MB, 0)


async def test_random_loads_unloads_and_deaths_leave_the_ledger_equal_to_the_hosts(mesh: Mesh, host: FakeHost) -> None:
    models = [await mesh.create(name) for name in ("tiny", "other", "tiny", "other", "tiny")]

    async def shuffle(worker: int) -> list[str]:
        refusals = []
        for step in range(6):
            model_id = models[(worker * 3 + step) % len(models)].id
            unload = mesh.models.UnloadModel(pb.UnloadModelRequest(id=model_id))
            (outcome,) = await asyncio.gather(
                mesh.load(model_id) if (worker + step) % 3 else unload, return_exceptions=True
            )
            if isinstance(outcome, grpc.aio.AioRpcError):
                refusals.append(outcome.code().name)
        return refusals

    refusals = await asyncio.gather(*(shuffle(worker) for worker in range(4)))
    assert {code for codes in refusals for code in codes} <= {"FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}

    async def quiet() -> bool:
        listed = await mesh.models.ListModels(pb.ListModelsRequest(status=LOADING))
        return listed.total == 0 and host.loading == 0

    await eventually(quiet)
    ready = await mesh.models.ListModels(pb.ListModelsRequest(status=READY))
    assert {model.id for model in ready.models} == set(host.held)
    assert await mesh.ledger() == (sum(model.memory_bytes for model in host.held.values()), 0)
    for model in models:
        await mesh.events(model.id)  # contiguous


async def test_two_who_plan_different_processes_for_one_model_get_one_copy(mesh: Mesh) -> None:
    left, right = [await mesh.add_host(FakeHost(host_id=name, accelerator=name)) for name in ("left", "right")]
    model = await mesh.create()
    registry = mesh.part.servicers[0].implementation._registry
    left.gate.clear()
    first = await load_on(registry, "left", model.id, ALONE, anywhere=True)
    assert await load_on(registry, "right", model.id, ALONE, anywhere=True) == first
    assert first[1] == "left"
    second = asyncio.create_task(ensure_resident(registry, "right", model.id, anywhere=True))
    left.gate.set()
    assert (await second).host_id == "left"
    assert (set(left.held), set(right.held)) == ({model.id}, set())
    assert (await ensure_resident(registry, "right", model.id)).host_id == "right"  # who wants it there gets it there


async def test_a_model_that_loses_one_of_two_copies_is_wanted_still(mesh: Mesh) -> None:
    sizes = {"tiny": 100 * MB, "other": 100 * MB}
    left, right = [
        await mesh.add_host(FakeHost(host_id=name, accelerator=name, budget=150 * MB, sizes=sizes))
        for name in ("left", "right")
    ]
    model, other = await mesh.create(), await mesh.create("other")
    for name in ("left", "right"):
        await mesh.placement.EnsureResident(devices_pb2.EnsureResidentRequest(host_id=name, model_id=model.id))
    await mesh.load(other.id, device="right")
    await mesh.reaches(other.id, READY)
    assert (set(left.held), set(right.held)) == ({model.id}, {other.id})
    left.held.clear()
    left.incarnation = "life-2"
    await mesh.announce(left)
    await eventually(lambda: model.id in left.held)
