"""Room for a lens: which lenses and models leave for it, as the plan said before, and a ledger that is always true."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import models_pb2
from lensmesh.training.v1 import training_pb2

from services.kit.database import Database
from services.kit.errors import Exhausted
from tests.support import eventually
from tests.wire.registry_host import weight
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def group(mesh: Mesh, name: str, lenses: int) -> tuple[str, list[str]]:
    """A group on a base that is not loaded; a lens costs 7 MB."""
    host = next(host for host, _ in mesh.hosts.values())
    host.transcoders[name] = training_pb2.Transcoder(
        id=name, artifact_uri=f"artifact://transcoder/{name}", base_digest=f"digest-{name}", size_bytes=7 * MB
    )
    model = await mesh.create(name)
    made = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name=name, model_id=model.id))
    kind = types.LENS_KIND_TRANSCODER
    request = pb.AttachLensRequest(group_id=made.id, kind=kind, transcoder_id=name)
    return made.id, [(await mesh.groups.AttachLens(request)).id for _ in range(lenses)]


async def crowded(
    mesh: Mesh, budget: int = 124 * MB, fit: int = 3, **changes: object
) -> tuple[FakeHost, str, list[str]]:
    """A base of 100 MB with four lenses, of which so many fit on the device."""
    host = await mesh.add_host(FakeHost(sizes=dict.fromkeys("ab", 100 * MB), budget=budget, **changes))
    made, lenses = await group(mesh, "a", 4)
    model_id = (await mesh.groups.GetGroup(pb.GetGroupRequest(id=made))).model_id
    await mesh.load(model_id)
    await mesh.reaches(model_id, models_pb2.MODEL_STATUS_READY)
    await eventually(lambda: len(host.held[model_id].lenses) == fit)
    return host, made, lenses


def here(host: FakeHost) -> set[str]:
    models = [model for model in host.held.values() if not model.parked]
    return {lens.lens_id for model in models for lens in model.lenses if not lens.parked}


def stowed(host: FakeHost) -> set[str]:
    return {lens.lens_id for model in host.held.values() for lens in model.lenses if lens.parked}


def leaving(plan: types.LoadPlan) -> list[tuple[str, str, bool]]:
    return [(e.lens_id or e.model_id, e.cause, e.parked) for e in plan.placements[0].evictions]


async def switch(mesh: Mesh, group_id: str, lens_id: str, **more: bool) -> pb.SwitchLensResponse:
    return await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group_id, lens_id=lens_id, **more))


async def assert_the_ledger_is_the_truth(mesh: Mesh, host: FakeHost) -> None:
    device = await mesh.device()
    assert device.used_bytes == sum(weight(model) for model in host.held.values() if not model.parked)
    assert device.parked_bytes == host.parked_bytes
    assert (device.reserved_bytes, device.used_bytes <= device.budget_bytes) == (0, True)


async def test_the_lens_that_was_used_longest_ago_leaves_for_another_as_planned(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh)
    assert here(host) == set(lenses[:3])
    await switch(mesh, made, lenses[0])
    await mesh.groups.AnalyzeText(pb.AnalyzeTextRequest(id=made, text="a", lens_ids=[lenses[1]]))
    plan = (await switch(mesh, made, lenses[3], validate_only=True)).plan
    assert [(e.lens_id, e.cause) for e in plan.placements[0].evictions] == [(lenses[2], "memory")]
    assert here(host) == set(lenses[:3])
    await switch(mesh, made, lenses[3])
    assert here(host) == {lenses[0], lenses[1], lenses[3]}
    assert not host.names("Unload")
    ((name, data),) = await mesh.events(lenses[2])
    assert (name, data["freed_bytes"], data["cause"]) == ("lens:evicted", 7 * MB, "memory")
    await switch(mesh, made, lenses[2])
    assert here(host) == {lenses[1], lenses[2], lenses[3]}
    status = await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=made))
    assert (status.active_lens_id, set(status.resident_lens_ids)) == (lenses[2], here(host))
    await assert_the_ledger_is_the_truth(mesh, host)


async def test_a_lens_that_came_into_use_stays_and_the_next_one_leaves(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh)
    (model,) = host.held.values()
    next(lens for lens in model.lenses if lens.lens_id == lenses[0]).leases = 1
    await switch(mesh, made, lenses[3])
    assert here(host) == {lenses[0], lenses[2], lenses[3]}
    await assert_the_ledger_is_the_truth(mesh, host)


async def test_where_no_lens_may_leave_the_switch_is_refused_and_nothing_moves(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh)
    (model,) = host.held.values()
    for lens in model.lenses:
        lens.leases = 1
    await mesh.beat(host)
    failure = await refused(switch(mesh, made, lenses[3]))
    assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "INSUFFICIENT_MEMORY")
    assert not host.names("DetachLens")
    assert here(host) == set(lenses[:3])
    await assert_the_ledger_is_the_truth(mesh, host)


async def test_idle_models_leave_when_all_idle_lenses_are_not_enough(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, 224 * MB, 4, park=500 * MB)
    other, (its,) = await group(mesh, "b", 1)
    b = (await mesh.groups.GetGroup(pb.GetGroupRequest(id=other))).model_id
    await mesh.groups.DetachLens(pb.DetachLensRequest(group_id=made, lens_id=lenses[3]))
    for lens in lenses[1:3]:
        await mesh.groups.DetachLens(pb.DetachLensRequest(group_id=made, lens_id=lens))
    await mesh.load(b)
    await mesh.reaches(b, models_pb2.MODEL_STATUS_READY)
    await eventually(lambda: its in here(host))
    host.transcoders["big"] = training_pb2.Transcoder(
        id="big", artifact_uri="artifact://transcoder/big", base_digest="digest-a", size_bytes=50 * MB
    )
    kind = types.LENS_KIND_TRANSCODER
    big = await mesh.groups.AttachLens(pb.AttachLensRequest(group_id=made, kind=kind, transcoder_id="big"))
    assert [request.model_id for request in host.names("Park")] == [b]
    assert here(host) == {lenses[0], big.id}
    await assert_the_ledger_is_the_truth(mesh, host)
    ((_, data),) = [event for event in await mesh.events(b) if event[0] == "model:evicted"]
    assert (data["cause"], data["parked"]) == ("memory", True)


@pytest.mark.parametrize("always", [False, True])
async def test_out_of_memory_despite_the_ledger_evicts_and_tries_once_more(mesh: Mesh, always: bool) -> None:
    host, made, _ = await crowded(mesh, 500 * MB, 4)
    host.transcoders["late"] = training_pb2.Transcoder(
        id="late", artifact_uri="artifact://transcoder/late", base_digest="digest-a", size_bytes=7 * MB
    )
    host.lens_error, host.lens_fails_always = Exhausted("out of memory", reason="DEVICE_OOM"), always
    kind = types.LENS_KIND_TRANSCODER
    request = pb.AttachLensRequest(group_id=made, kind=kind, transcoder_id="late")
    if always:
        assert (await refused(mesh.groups.AttachLens(request))).reason == "INSUFFICIENT_MEMORY"
        assert here(host) == set()
    else:
        late = await mesh.groups.AttachLens(request)
        assert here(host) == {late.id}
    await assert_the_ledger_is_the_truth(mesh, host)


async def lens_residency(mesh: Mesh, group_id: str, lens_id: str) -> int:
    lenses = (await mesh.groups.GetGroup(pb.GetGroupRequest(id=group_id))).lenses
    return next(lens.residency for lens in lenses if lens.id == lens_id)


async def test_beyond_the_limit_the_lens_that_was_parked_longest_ago_goes_to_disk(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, 117 * MB, 2, park=14 * MB)
    for lens, gone, parked in ((2, [], [0]), (3, [], [0, 1]), (0, [1], [2]), (1, [], [2, 3])):
        plan = (await switch(mesh, made, lenses[lens], validate_only=True)).plan
        left = {name for name, cause, _ in leaving(plan) if cause == "park_limit"}
        await switch(mesh, made, lenses[lens])
        assert (left, stowed(host)) == ({lenses[n] for n in gone}, {lenses[n] for n in parked})
        await assert_the_ledger_is_the_truth(mesh, host)


async def test_a_host_that_does_not_park_a_lens_sends_it_to_disk(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, park=14 * MB)
    host.refuses_to_park = True
    await switch(mesh, made, lenses[3])
    assert (here(host), stowed(host)) == (set(lenses[1:]), set())
    ((_, data),) = await mesh.events(lenses[0])
    assert data["parked"] is False
    assert await lens_residency(mesh, made, lenses[0]) == pb.RESIDENCY_DISK
    await assert_the_ledger_is_the_truth(mesh, host)


async def test_parked_lenses_give_way_to_a_base_that_is_parked_by_a_load(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, park=125 * MB)
    await switch(mesh, made, lenses[3])
    other = await mesh.create("b")
    a = (await mesh.groups.GetGroup(pb.GetGroupRequest(id=made))).model_id
    plan = (await mesh.load(other.id, validate_only=True)).plan
    assert leaving(plan) == [(lenses[0], "park_limit", False), (a, "memory", True)]
    await mesh.load(other.id)
    await mesh.reaches(other.id, models_pb2.MODEL_STATUS_READY)
    assert (host.held[a].parked, stowed(host)) == (True, set())
    assert await lens_residency(mesh, made, lenses[0]) == pb.RESIDENCY_DISK
    await assert_the_ledger_is_the_truth(mesh, host)


async def test_rows_follow_what_the_host_has_parked_and_forget_it_with_its_base(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, park=14 * MB)
    await switch(mesh, made, lenses[3])
    (model,) = host.held.values()
    for lens in model.lenses:
        lens.parked = lens.lens_id == lenses[1]
    kept = [lens for lens in model.lenses if lens.lens_id != lenses[0]]
    del model.lenses[:]
    model.lenses.extend(kept)
    await mesh.beat(host)
    assert [await lens_residency(mesh, made, lens) for lens in lenses[:2]] == [pb.RESIDENCY_DISK, pb.RESIDENCY_PARKED]
    await assert_the_ledger_is_the_truth(mesh, host)
    await mesh.models.UnloadModel(models_pb2.UnloadModelRequest(id=model.model_id))
    assert (await mesh.device()).parked_bytes == 0
    assert await lens_residency(mesh, made, lenses[1]) == pb.RESIDENCY_DISK


async def test_a_lens_that_cannot_come_back_stays_parked(mesh: Mesh) -> None:
    host, made, lenses = await crowded(mesh, park=14 * MB)
    await switch(mesh, made, lenses[3])
    host.lens_error = Exhausted("no room", reason="INSUFFICIENT_MEMORY")
    assert (await refused(switch(mesh, made, lenses[0]))).reason == "INSUFFICIENT_MEMORY"
    assert lenses[0] in stowed(host)
    await assert_the_ledger_is_the_truth(mesh, host)
