"""Loads over gRPC: the plan, the ledger, the events, and every way in which a load ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import devices_pb2, devices_pb2_grpc, jobs_pb2, models_pb2_grpc
from lensmesh.registry.v1 import models_pb2 as pb

from services.kit import errors
from services.kit.database import Database
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
    sizes = {"tiny": 100 * MB, "other": 100 * MB, "third": 100 * MB, "fourth": 100 * MB, "big": 950 * MB}
    return await mesh.add_host(FakeHost(sizes=sizes))


async def test_a_load_is_loading_before_it_answers_and_tells_every_step(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.step = 1
    host.gate.clear()
    started = await mesh.load(model.id)
    assert (started.status, started.plan.placements[0].device) == (LOADING, "device-0/cpu")
    assert (await mesh.get(model.id)).status == LOADING
    assert await mesh.ledger() == (0, 110 * MB)
    await eventually(lambda: host.loading)
    host.gate.set()
    ready = await mesh.reaches(model.id, READY)
    assert (ready.memory_usage_bytes, ready.load_time_seconds, ready.progress) == (100 * MB, 1.5, 100)
    assert (ready.device, ready.fingerprint) == ("device-0/cpu", f"fp-{model.id}-1")
    assert await mesh.ledger() == (100 * MB, 0)
    events = await mesh.events(model.id)
    assert [name for name, _ in events] == ["model:loading"] * (len(events) - 1) + ["model:ready"]
    progress = [data["progress"] for name, data in events if name == "model:loading"]
    assert progress == sorted(progress)
    assert max(b - a for a, b in zip(progress, [*progress[1:], 100.0], strict=True)) <= 5
    assert len(progress) == 21  # the acceptance, and one per 5 %, not one per message
    assert set(events[1][1]) >= {"model_id", "status", "progress", "message", "timestamp", "sequence"}
    assert events[-1][1]["memory_usage_bytes"] == 100 * MB
    assert events[-1][1]["load_time_seconds"] == 1.5
    job = await mesh.settled(started.task_id)
    assert (job.kind, job.status, job.progress) == ("model_load", jobs_pb2.JOB_STATE_COMPLETED, 100)


async def test_loading_twice_conflicts_and_a_ready_model_stays_as_it_is(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.gate.clear()
    started = await mesh.load(model.id)
    failure = await refused(mesh.load(model.id))
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "ALREADY_LOADING")
    assert failure.facts["task_id"] == started.task_id
    host.gate.set()
    await mesh.reaches(model.id, READY)
    again = await mesh.load(model.id)
    assert (again.status, again.task_id) == (READY, "")
    assert len(host.names("Load")) == 1


async def test_what_does_not_fit_is_refused_with_both_numbers_and_changes_nothing(mesh: Mesh, host: FakeHost) -> None:
    host.sizes["huge"] = 2000 * MB
    model = await mesh.create("huge")
    before = await mesh.get(model.id)
    failure = await refused(mesh.load(model.id))
    assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "INSUFFICIENT_MEMORY")
    assert float(failure.facts["required_memory_gb"]) == pytest.approx(2.01)
    assert float(failure.facts["available_memory_gb"]) == pytest.approx(1.0)
    assert await mesh.get(model.id) == before
    assert await mesh.events(model.id) == []
    assert await mesh.ledger() == (0, 0)
    failed_create = await refused(mesh.create("huge", auto_load=True))
    assert failed_create.reason == "INSUFFICIENT_MEMORY"
    assert (await mesh.models.ListModels(pb.ListModelsRequest())).total == 1


async def test_the_plan_names_what_is_evicted_and_exactly_that_happens(mesh: Mesh, host: FakeHost) -> None:
    oldest = await mesh.ready("tiny")
    kept = await mesh.ready("other", pinned=True)
    big = await mesh.create("third")
    host.sizes["third"] = 780 * MB
    planned = await mesh.load(big.id, validate_only=True)
    assert [e.model_id for e in planned.plan.placements[0].evictions] == []
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=kept.id))
    host.sizes["third"] = 795 * MB
    await mesh.load(kept.id)
    await mesh.reaches(kept.id, READY)
    planned = await mesh.load(big.id, validate_only=True)
    assert [(e.model_id, e.bytes, e.cause) for e in planned.plan.placements[0].evictions] == [
        (oldest.id, 100 * MB, "memory")
    ]
    assert (await mesh.get(oldest.id)).status == READY  # a plan changes nothing
    host.gate.clear()
    await mesh.load(big.id)
    assert sum(await mesh.ledger()) <= host.budget
    await mesh.reaches(oldest.id, UNLOADED)
    host.gate.set()
    await mesh.reaches(big.id, READY)
    assert set(host.held) == {kept.id, big.id}
    assert await mesh.ledger() == (895 * MB, 0)
    name, data = (await mesh.events(oldest.id))[-2]
    assert (name, data["cause"], data["freed_bytes"]) == ("model:evicted", "memory", 100 * MB)
    assert (await mesh.events(oldest.id))[-1][0] == "model:unloaded"


async def test_a_leased_model_is_not_evicted_even_when_the_registry_learns_of_it_too_late(
    mesh: Mesh, host: FakeHost
) -> None:
    first = await mesh.ready("tiny")
    host.held[first.id].leases = 1  # taken after the last heartbeat
    big = await mesh.create("big")
    await mesh.load(big.id)
    failed = await mesh.reaches(big.id, FAILED)
    assert failed.error_code == "INSUFFICIENT_MEMORY"
    assert (await mesh.get(first.id)).status == READY
    assert set(host.held) == {first.id}
    assert await mesh.ledger() == (100 * MB, 0)
    refusal = await refused(mesh.load(big.id))  # now it knows
    assert refusal.reason == "INSUFFICIENT_MEMORY"
    host.held[first.id].leases = 0
    await mesh.beat(host)
    await mesh.load(big.id)
    await mesh.reaches(big.id, READY)


async def test_the_number_of_resident_models_is_limited_by_evicting_the_least_recently_used(
    mesh: Mesh, host: FakeHost
) -> None:
    models = [await mesh.ready(name) for name in ("tiny", "other", "third")]
    fourth = await mesh.ready("fourth")
    assert set(host.held) == {models[1].id, models[2].id, fourth.id}
    for model_id in host.held:
        host.held[model_id].leases = 1
    await mesh.beat(host)
    failure = await refused(mesh.load(models[0].id))
    assert (failure.reason, failure.facts["limit"]) == ("QUOTA_EXCEEDED", "3")


async def test_another_quantization_is_a_reload_and_refused_under_a_lease(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.held[model.id].leases = 1
    int8 = {"quantization": types.QUANTIZATION_INT8}
    failure = await refused(mesh.load(model.id, **int8))  # the host knows, the rows do not yet
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "IN_USE")
    assert (await mesh.get(model.id)).status == READY
    await mesh.beat(host)
    assert (await refused(mesh.load(model.id, **int8))).reason == "IN_USE"
    host.held[model.id].leases = 0
    await mesh.beat(host)
    await mesh.load(model.id, **int8)
    ready = await mesh.reaches(model.id, READY)
    assert (ready.quantization, ready.memory_usage_bytes) == (types.QUANTIZATION_INT8, 50 * MB)
    assert await mesh.ledger() == (50 * MB, 0)


async def test_a_permanent_failure_is_tried_once_and_leaves_the_ledger_as_before(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.load_errors = [errors.Failed("the checkpoint is truncated", reason="MODEL_LOAD_FAILED", metadata={"at": 7})]
    await mesh.load(model.id)
    failed = await mesh.reaches(model.id, FAILED)
    assert (failed.error_code, failed.error_message) == ("MODEL_LOAD_FAILED", "the checkpoint is truncated")
    assert len(host.names("Load")) == 1
    assert await mesh.ledger() == (0, 0)
    name, data = (await mesh.events(model.id))[-1]
    assert (name, data["error_code"], data["details"]) == ("model:failed", "MODEL_LOAD_FAILED", {"at": "7"})
    await mesh.load(model.id)  # failed may be loaded again
    ready = await mesh.reaches(model.id, READY)
    assert not ready.HasField("error_code")


async def test_transient_failures_are_tried_three_times(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    oom = errors.Exhausted("out of memory", reason="DEVICE_OOM")
    host.load_errors = [errors.Unavailable("the hub hiccups"), oom]
    await mesh.load(model.id)
    await mesh.reaches(model.id, READY)
    assert len(host.names("Load")) == 3
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    hiccup = errors.Unavailable("the hub hiccups")
    host.load_errors = [hiccup, hiccup, errors.Unavailable("the hub is gone")]
    started = await mesh.load(model.id)
    failed = await mesh.reaches(model.id, FAILED)
    await mesh.settled(started.task_id)
    pauses = [data["retry_seconds"] for name, data in await mesh.events(started.task_id) if name == "load:retrying"]
    assert pauses == [0.02, 0.04]
    assert (failed.error_message, len(host.names("Load"))) == ("the hub is gone", 6)
    assert await mesh.ledger() == (0, 0)


async def test_a_device_that_runs_out_of_memory_is_cleared_and_tried_once_more(mesh: Mesh, host: FakeHost) -> None:
    oom = errors.Exhausted("out of memory", reason="DEVICE_OOM")
    idle, model = await mesh.ready(), await mesh.create()
    host.load_errors = [oom]
    await mesh.load(model.id)
    await mesh.reaches(model.id, READY)
    assert list(host.held) == [model.id]
    assert len(host.names("Load")) == 3
    assert [data["cause"] for name, data in await mesh.events(idle.id) if name == "model:evicted"] == ["out_of_memory"]
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    host.load_errors = [oom] * 6
    await mesh.load(model.id)
    failed = await mesh.reaches(model.id, FAILED)
    assert (failed.error_code, host.load_errors) == ("INSUFFICIENT_MEMORY", [])
    assert await mesh.ledger() == (0, 0)


async def test_a_load_that_runs_can_be_cancelled_and_leaves_nothing(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.gate.clear()
    started = await mesh.load(model.id)
    await eventually(lambda: host.loading)
    await mesh.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=started.task_id))
    await mesh.reaches(model.id, pb.MODEL_STATUS_PENDING)
    await eventually(lambda: host.loading == 0)
    assert (await mesh.settled(started.task_id)).status == jobs_pb2.JOB_STATE_CANCELLED
    assert host.held == {}
    assert await mesh.ledger() == (0, 0)
    assert (await mesh.events(model.id))[-1][1]["cause"] == "cancelled"


async def test_two_loads_run_at_once_and_a_queued_one_can_be_cancelled(mesh: Mesh, host: FakeHost) -> None:
    models = [await mesh.create(name) for name in ("tiny", "other", "third")]
    host.gate.clear()
    started = [await mesh.load(model.id) for model in models]
    await eventually(lambda: host.loading == 2)
    queued = await mesh.jobs.GetJob(jobs_pb2.GetJobRequest(id=started[2].task_id))
    assert queued.status == jobs_pb2.JOB_STATE_QUEUED
    await mesh.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=started[2].task_id))
    assert (await mesh.get(models[2].id)).status == pb.MODEL_STATUS_PENDING
    assert await mesh.ledger() == (0, 220 * MB)
    await mesh.load(models[2].id)
    host.gate.set()
    for model in models:
        await mesh.reaches(model.id, READY)
    assert host.most_loading == 2


async def test_loads_within_an_hour_are_limited_for_a_user_and_the_token_may_lift_it(
    mesh: Mesh, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await mesh.create()
    stub = models_pb2_grpc.ModelServiceStub(mesh.as_user("eve", "model:read", "model:write", loads_per_hour=2))
    for _ in range(2):
        await stub.LoadModel(pb.LoadModelRequest(id=model.id))
        await mesh.reaches(model.id, READY)
        await stub.LoadModel(pb.LoadModelRequest(id=model.id))  # nothing to do: not counted
        await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    failure = await refused(stub.LoadModel(pb.LoadModelRequest(id=model.id)))
    assert (failure.code, failure.reason, failure.facts["limit"]) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", "2")
    assert failure.retry_seconds is not None
    assert 3500 < failure.retry_seconds <= 3600
    assert (await mesh.get(model.id)).status == UNLOADED
    lifted = models_pb2_grpc.ModelServiceStub(mesh.as_user("eve", "model:read", "model:write", loads_per_hour=50))
    await lifted.LoadModel(pb.LoadModelRequest(id=model.id))
    await mesh.reaches(model.id, READY)


async def test_unload_answers_when_the_memory_is_back_and_refuses_under_a_lease(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.held[model.id].leases = 2
    assert (await refused(mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id)))).reason == "IN_USE"
    assert (await mesh.get(model.id)).status == READY
    host.held[model.id].leases = 0
    unloaded = await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id, wait_seconds=5))
    assert [request.wait_seconds for request in host.names("Unload")] == [0, 5]
    assert (unloaded.status, unloaded.HasField("memory_usage_bytes")) == (UNLOADED, False)
    assert (host.held, await mesh.ledger()) == ({}, (0, 0))
    assert (await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))).status == UNLOADED
    never = await mesh.create()
    assert (await refused(mesh.models.UnloadModel(pb.UnloadModelRequest(id=never.id)))).reason == "WRONG_STATE"


async def test_estimates_follow_what_a_load_really_took(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    host.sizes["tiny"] = 120 * MB  # the estimator's opinion; the load measured 100 MB
    plan = await mesh.models.EstimateModel(pb.EstimateModelRequest(id=model.id))
    assert (plan.required_memory_bytes, plan.breakdown.weights) == (110 * MB, 100 * MB)
    assert plan.estimated_seconds == 1.5
    int8 = await mesh.models.EstimateModel(pb.EstimateModelRequest(id=model.id, quantization=types.QUANTIZATION_INT8))
    assert int8.required_memory_bytes == 70 * MB


async def test_a_reload_in_the_same_process_must_give_the_same_bits(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    await mesh.load(model.id)
    await mesh.reaches(model.id, READY)
    first, second = host.names("Load")
    assert (first.expected_fingerprint, first.expected_digest) == ("", "digest-tiny")
    assert second.expected_fingerprint == f"fp-{model.id}-1"


async def test_a_move_loads_there_then_leaves_here(mesh: Mesh, host: FakeHost) -> None:
    gpu = await mesh.add_host(FakeHost(host_id="gpu", device="cuda:0"))
    model = await mesh.create()
    await mesh.load(model.id, device="cpu")
    await mesh.reaches(model.id, READY)
    assert set(host.held) == {model.id}
    request = pb.MoveModelRequest(id=model.id, device="gpu/cuda:0", request_id="r1")
    moved = await mesh.models.MoveModel(request)
    await mesh.settled(moved.task_id)
    assert (await mesh.models.MoveModel(request)).task_id == moved.task_id
    assert (set(host.held), set(gpu.held)) == (set(), {model.id})
    now = await mesh.get(model.id)
    assert (now.status, now.device) == (READY, "gpu/cuda:0")
    assert (await mesh.ledger(), await mesh.ledger("gpu")) == ((0, 0), (100 * MB, 0))
    assert (await mesh.events(model.id))[-1][0] == "model:moved"
    elsewhere = await refused(mesh.load(model.id, device="cpu"))
    assert elsewhere.reason == "WRONG_STATE"
    assert (await refused(mesh.load(model.id, device="cuda:7"))).reason == "WRONG_STATE"


async def test_the_cpu_is_used_only_when_asked_for_or_as_a_fallback_that_is_told(mesh: Mesh, host: FakeHost) -> None:
    await mesh.add_host(FakeHost(host_id="gpu", device="cuda:0", budget=50 * MB))
    model = await mesh.create()
    assert (await refused(mesh.load(model.id))).reason == "INSUFFICIENT_MEMORY"
    started = await mesh.load(model.id, fallback=pb.FALLBACK_CPU)
    assert "CPU" in started.message
    ready = await mesh.reaches(model.id, READY)
    assert (ready.device, ready.fell_back_to_cpu) == ("device-0/cpu", True)
    assert (await mesh.events(model.id))[0][1]["fell_back_to_cpu"] is True
    host.held.clear()
    host.incarnation = "life-2"
    await mesh.announce(host)
    again = await mesh.reaches(model.id, READY)
    assert (again.device, again.fell_back_to_cpu) == ("device-0/cpu", True)


async def test_no_host_is_a_503_that_says_so(mesh: Mesh) -> None:
    failure = await refused(mesh.create())
    assert (failure.code, failure.reason) == ("UNAVAILABLE", "NO_HOST")
    host = await mesh.add_host(FakeHost())
    model = await mesh.create()
    assert (await refused(mesh.load(model.id, device="cuda:0"))).reason == "NO_HOST"
    assert host.names("Load") == []


async def test_a_model_may_be_resident_in_several_processes(mesh: Mesh, host: FakeHost) -> None:
    training = await mesh.add_host(FakeHost(host_id="training", services=("training",)))
    model = await mesh.ready()
    assert (set(host.held), set(training.held)) == ({model.id}, set())  # the one that serves extraction is preferred
    training.gate.clear()
    ensure = devices_pb2.EnsureResidentRequest(host_id="training", model_id=model.id)
    calls = [asyncio.ensure_future(mesh.placement.EnsureResident(ensure)) for _ in range(3)]
    await eventually(lambda: training.loading)
    assert (await mesh.get(model.id)).status == READY  # the first copy serves meanwhile
    training.gate.set()
    for location in await asyncio.gather(*calls):
        assert (location.host_id, location.address) == ("training", training.address)
    assert len(training.names("Load")) == 1
    located = await mesh.placement.LocateModel(devices_pb2.LocateModelRequest(model_id=model.id))
    assert located.host_id == "device-0"
    await mesh.models.UnloadModel(pb.UnloadModelRequest(id=model.id))
    assert (host.held, training.held) == ({}, {})
    gone = await refused(mesh.placement.LocateModel(devices_pb2.LocateModelRequest(model_id=model.id)))
    assert gone.reason == "WRONG_STATE"


async def test_who_waits_for_a_model_hears_why_it_did_not_come(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.load_errors = [errors.Failed("corrupt", reason="MODEL_LOAD_FAILED")]
    ensure = devices_pb2.EnsureResidentRequest(host_id="device-0", model_id=model.id)
    failure = await refused(mesh.placement.EnsureResident(ensure))
    assert (failure.reason, failure.message) == ("MODEL_LOAD_FAILED", "corrupt")
    assert len(host.names("Load")) == 1
    unknown = devices_pb2.EnsureResidentRequest(host_id="nowhere", model_id=model.id)
    assert (await refused(mesh.placement.EnsureResident(unknown))).code == "NOT_FOUND"


async def test_reservations_never_exceed_the_ledger(mesh: Mesh, host: FakeHost) -> None:
    host.held[(await mesh.ready()).id].leases = 1
    await mesh.beat(host)

    def reserve(owner: str, size: int) -> devices_pb2.ReserveRequest:
        return devices_pb2.ReserveRequest(host_id="device-0", owner=owner, bytes=size)

    outcomes = await asyncio.gather(
        *(mesh.placement.Reserve(reserve(f"job_{n}", 200 * MB)) for n in range(8)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 4
    assert await mesh.ledger() == (100 * MB, 800 * MB)
    held = next(outcome.owner for outcome in outcomes if not isinstance(outcome, Exception))
    await mesh.placement.Reserve(reserve(held, 300 * MB))  # replaces its own
    refusal = await refused(mesh.placement.Reserve(reserve(held, 301 * MB)))
    assert (refusal.reason, float(refusal.facts["available_memory_gb"])) == ("INSUFFICIENT_MEMORY", 0.3)
    model = await mesh.create("other")
    assert (await refused(mesh.load(model.id))).reason == "INSUFFICIENT_MEMORY"  # 0 free, and nothing may leave
    await mesh.placement.Release(devices_pb2.ReleaseRequest(host_id="device-0", owner=held))
    assert await mesh.ledger() == (100 * MB, 600 * MB)


async def test_a_gang_reserves_all_its_devices_or_none_and_its_host_gives_them_back(mesh: Mesh, host: FakeHost) -> None:
    def reserve(host_id: str, size: int, ranks: int, owner: str = "job_1") -> Any:
        return mesh.placement.Reserve(
            devices_pb2.ReserveRequest(host_id=host_id, owner=owner, bytes=size * MB, ranks=ranks)
        )

    assert list((await reserve("device-0", 200, 3)).devices) == ["cpu"] * 3  # of one CPU, with the bytes of all
    assert await mesh.ledger() == (0, 600 * MB)
    assert (await refused(reserve("device-0", 501, 2))).reason == "INSUFFICIENT_MEMORY"
    assert await mesh.ledger() == (0, 600 * MB)  # what it had stays
    await mesh.placement.Release(devices_pb2.ReleaseRequest(host_id="device-0", owner="job_1"))
    assert await mesh.ledger() == (0, 0)

    await mesh.add_host(FakeHost("device-1", "cpu", budget=900 * MB))
    assert list((await reserve("device-0", 650, 2)).devices) == ["cpu"] * 2  # more than it has alone
    assert [(await mesh.ledger(name))[1] for name in ("device-0", "device-1")] == [650 * MB, 650 * MB]
    for size, ranks in ((950, 2), (850, 2), (650, 3)):  # the other's bytes, the machine's 1,600 MB, too few processes
        assert (await refused(reserve("device-0", size, ranks))).reason == "INSUFFICIENT_MEMORY"
    assert [(await mesh.ledger(name))[1] for name in ("device-0", "device-1")] == [650 * MB, 650 * MB]
    await mesh.placement.Release(devices_pb2.ReleaseRequest(host_id="device-0", owner="job_1"))
    assert [(await mesh.ledger(name))[1] for name in ("device-0", "device-1")] == [0, 0]

    for number, budget in enumerate((500, 400, 600)):
        device = FakeHost(f"gpu-{number}", "cuda:0", accelerator=str(number), budget=budget * MB)
        await mesh.add_host(device)
    too_many = await refused(reserve("gpu-0", 100, 4))
    assert (too_many.reason, too_many.facts["available"]) == ("UNSUPPORTED", "3")
    assert list((await reserve("gpu-0", 300, 2)).devices) == ["0", "2"]  # the emptiest other one
    ledgers = [(await mesh.ledger(f"gpu-{number}"))[1] for number in range(3)]
    assert ledgers == [300 * MB, 0, 300 * MB]
    assert (await refused(reserve("gpu-1", 350, 3, "job_2"))).reason == "INSUFFICIENT_MEMORY"
    assert (await mesh.ledger("gpu-1"))[1] == 0
    lost, _ = mesh.hosts["gpu-0"]
    lost.incarnation = "life-2"
    await mesh.announce(lost)  # its ranks are gone with it, on all devices
    assert [(await mesh.ledger(f"gpu-{number}"))[1] for number in range(3)] == [0, 0, 0]


async def test_clearing_a_device_unloads_what_is_idle(mesh: Mesh, host: FakeHost) -> None:
    idle = await mesh.ready("tiny")
    pinned = await mesh.ready("other", pinned=True)
    used = await mesh.ready("third")
    host.held[used.id].leases = 1
    await mesh.beat(host)
    admin = devices_pb2_grpc.DeviceServiceStub(mesh.as_user("root", "model:admin"))
    cleared = await admin.ClearDevice(devices_pb2.ClearDeviceRequest(id="device-0/cpu"))
    assert (list(cleared.model_ids), cleared.freed_bytes) == ([idle.id], 103 * MB)
    assert set(host.held) == {pinned.id, used.id}
    device = await mesh.device()
    assert {m.model_id: m.leases for m in device.models} == {pinned.id: 0, used.id: 1}
    assert (device.alive, device.kind, list(device.services)) == (True, "fake", list(host.services))
