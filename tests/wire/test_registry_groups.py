"""Groups and lenses over gRPC: attach, switch, analyze, and what happens to lenses when their base comes and goes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.extensions.v1 import extensions_pb2
from lensmesh.registry.v1 import devices_pb2, jobs_pb2, models_pb2
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.training.v1 import training_pb2

from services.kit import errors
from services.kit.database import Database
from tests.support import eventually
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running

READY = models_pb2.MODEL_STATUS_READY


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


@pytest.fixture
async def host(mesh: Mesh) -> FakeHost:
    host = FakeHost(sizes={"tiny": 100 * MB, "other": 100 * MB})
    for name, changes in {
        "good": {},
        "second": {"layer": 3},
        "foreign": {"base_digest": "digest-of-another"},
        "deep": {"layer": 4},
        "wide": {"d_in": 128},
        "large": {"size_bytes": 2000 * MB},
    }.items():
        facts: dict[str, Any] = {"layer": 2, "d_in": 64, "base_digest": "digest-tiny", "size_bytes": 8 * MB}
        host.transcoders[name] = training_pb2.Transcoder(
            id=name, artifact_uri=f"artifact://transcoder/{name}", **{**facts, **changes}
        )
    host.extensions["x_1"] = extensions_pb2.Extension(
        id="x_1", model_id="", artifact_uri="artifact://extension/x_1", base_digest="digest-tiny", size_bytes=2 * MB
    )
    return await mesh.add_host(host)


async def group_on(mesh: Mesh, model_id: str) -> pb.Group:
    return await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="g", model_id=model_id))


async def attach(mesh: Mesh, group_id: str, transcoder_id: str) -> pb.Lens:
    return await mesh.groups.AttachLens(
        pb.AttachLensRequest(group_id=group_id, kind=types.LENS_KIND_TRANSCODER, transcoder_id=transcoder_id)
    )


async def switch(mesh: Mesh, group_id: str, lens_id: str | None) -> pb.SwitchLensResponse:
    return await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group_id, lens_id=lens_id))


async def get(mesh: Mesh, group_id: str) -> pb.Group:
    return await mesh.groups.GetGroup(pb.GetGroupRequest(id=group_id))


async def test_lenses_are_brought_to_a_resident_base_and_share_its_bytes(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    first, second = await attach(mesh, group.id, "good"), await attach(mesh, group.id, "second")
    assert (first.residency, first.memory_bytes, first.layer) == (pb.RESIDENCY_DEVICE, 7 * MB, 2)
    logit = await mesh.groups.AttachLens(pb.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_LOGIT_LENS))
    sent = host.names("AttachLens")[0]
    assert (sent.lens.lens_id, sent.lens.artifact_uri, sent.lens.layer) == (
        first.id,
        "artifact://transcoder/good",
        2,
    )
    status = await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=group.id))
    assert (status.residency, status.device, status.fully_loaded) == (pb.RESIDENCY_DEVICE, "device-0/cpu", True)
    assert set(status.resident_lens_ids) == {first.id, second.id, logit.id}
    assert (status.shared_bytes, status.lens_bytes, status.saved_bytes) == (100 * MB, 21 * MB, 200 * MB)
    assert await mesh.ledger() == (121 * MB, 0)
    assert (await get(mesh, group.id)).estimated_memory_bytes == 121 * MB
    listed = await mesh.groups.ListGroups(pb.ListGroupsRequest(model_id=model.id))
    assert [(g.id, len(g.lenses), g.estimated_memory_bytes) for g in listed.groups] == [(group.id, 3, 121 * MB)]


@pytest.mark.parametrize(
    ("transcoder", "facts"),
    [
        ("foreign", {"lens_base_digest": "digest-of-another", "base_digest": "digest-tiny"}),
        ("deep", {"lens_layer": "4", "num_layers": "4"}),
        ("wide", {"lens_width": "128", "width": "64"}),
    ],
)
async def test_a_lens_of_another_base_is_refused_with_both_values(
    mesh: Mesh, host: FakeHost, transcoder: str, facts: dict[str, str]
) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    failure = await refused(attach(mesh, group.id, transcoder))
    assert (failure.code, failure.reason, failure.facts) == ("FAILED_PRECONDITION", "LENS_INCOMPATIBLE", facts)
    assert host.names("AttachLens") == []
    assert list((await get(mesh, group.id)).lenses) == []


async def test_a_lens_that_cannot_come_leaves_group_and_ledger_as_before(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    assert (await refused(attach(mesh, group.id, "large"))).reason == "INSUFFICIENT_MEMORY"
    host.lens_error = errors.Failed("its files are corrupt", reason="CHECKSUM_MISMATCH")
    assert (await refused(attach(mesh, group.id, "good"))).reason == "CHECKSUM_MISMATCH"
    assert (await refused(attach(mesh, group.id, "none"))).code == "NOT_FOUND"
    assert list((await get(mesh, group.id)).lenses) == []
    assert await mesh.ledger() == (100 * MB, 0)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"kind": types.LENS_KIND_TRANSCODER}, "transcoder_id"),
        ({"kind": types.LENS_KIND_EXTENSION, "transcoder_id": "good", "extension_id": "x_1"}, "transcoder_id"),
        ({"kind": types.LENS_KIND_TUNED_LENS}, "artifact_uri"),
        ({"kind": types.LENS_KIND_LOGIT_LENS, "artifact_uri": "artifact://a/b"}, "artifact_uri"),
    ],
)
async def test_a_kinds_fields_are_checked(mesh: Mesh, host: FakeHost, fields: dict[str, Any], wrong: str) -> None:
    group = await group_on(mesh, (await mesh.create()).id)
    failure = await refused(mesh.groups.AttachLens(pb.AttachLensRequest(group_id=group.id, **fields)))
    assert (failure.reason, failure.fields) == ("VALIDATION_ERROR", [wrong])


async def test_a_switch_tells_seconds_and_bytes_and_what_is_active(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    first, second = await attach(mesh, group.id, "good"), await attach(mesh, group.id, "second")
    done = await switch(mesh, group.id, second.id)
    assert (done.lens_id, done.seconds, done.memory_before_bytes, done.memory_after_bytes) == (second.id, 0.002, 5, 6)
    assert (await get(mesh, group.id)).active_lens_id == second.id
    base = await switch(mesh, group.id, None)
    assert not base.HasField("lens_id")
    assert not (await get(mesh, group.id)).HasField("active_lens_id")
    assert [request.lens_id for request in host.names("SwitchLens")] == [second.id, ""]
    events = await mesh.events(group.id)
    assert [name for name, _ in events] == ["group:switching", "group:switched"] * 2
    assert (events[1][1]["lens_id"], events[1][1]["kind"], events[1][1]["seconds"]) == (second.id, "within", 0.002)
    status = await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=group.id))
    assert status.estimated_switch_seconds.within_group == pytest.approx(0.002)
    assert status.estimated_switch_seconds.cross_group == 1.5
    assert (await refused(switch(mesh, group.id, "lens_none"))).code == "NOT_FOUND"
    assert first.id != second.id


async def test_a_group_whose_base_is_nowhere_says_so(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    group = await group_on(mesh, model.id)
    lens = await attach(mesh, group.id, "good")
    assert lens.residency == pb.RESIDENCY_DISK
    for call in (
        mesh.groups.AnalyzeText(pb.AnalyzeTextRequest(id=group.id, text="a", lens_ids=[lens.id])),
        mesh.groups.MoveGroup(pb.MoveGroupRequest(id=group.id, device="cpu")),
    ):
        failure = await refused(call)
        assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "GROUP_NOT_RESIDENT")
        assert failure.facts["model_id"] == model.id
    status = await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=group.id))
    assert (status.residency, status.fully_loaded, status.saved_bytes) == (pb.RESIDENCY_DISK, False, 0)


async def test_lenses_come_back_with_their_base_and_a_broken_one_fails_alone(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    host.extensions["x_1"].model_id = model.id
    group = await group_on(mesh, model.id)
    transcoder = await attach(mesh, group.id, "good")
    extension = await mesh.groups.AttachLens(
        pb.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_EXTENSION, extension_id="x_1")
    )
    await switch(mesh, group.id, extension.id)
    host.held.clear()  # the process died and came back empty
    host.incarnation = "life-2"
    await mesh.announce(host)
    await mesh.reaches(model.id, READY)

    async def whole() -> bool:
        status = await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=group.id))
        return status.fully_loaded

    await eventually(whole)
    await eventually(lambda: host.held[model.id].active_lens_id == extension.id)
    assert (await get(mesh, group.id)).active_lens_id == extension.id
    host.held.clear()
    host.incarnation = "life-3"
    host.lens_error = errors.Failed("its files are gone", reason="ARTIFACT_LOST")
    await mesh.announce(host)
    await mesh.reaches(model.id, READY)

    async def told() -> bool:
        lenses = (await get(mesh, group.id)).lenses
        return {lens.error_code for lens in lenses} == {"ARTIFACT_LOST"}

    await eventually(told)
    host.lens_error = None
    await switch(mesh, group.id, transcoder.id)  # a switch brings what is missing
    assert {lens.lens_id for lens in host.held[model.id].lenses} == {transcoder.id}


async def test_analyze_reads_with_the_active_lens_or_the_named_ones(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    first, second = await attach(mesh, group.id, "good"), await attach(mesh, group.id, "second")

    async def analyze(**fields: Any) -> pb.AnalyzeTextResponse:
        return await mesh.groups.AnalyzeText(pb.AnalyzeTextRequest(id=group.id, **fields))

    assert (await refused(analyze(text="hello"))).fields == ["lens_ids"]
    assert (await refused(analyze(text="hello", token_ids=[1]))).fields == ["text"]
    await switch(mesh, group.id, second.id)
    read = await analyze(text="hello")
    assert ([r.lens_id for r in read.readings], read.seconds) == ([second.id], 0.5)
    await analyze(token_ids=[5, 6], lens_ids=[first.id, second.id], top_k=3, prefix=2)
    default, named = host.names("Analyze")
    assert (default.text, default.top_k) == ("hello", 10)
    assert (list(named.token_ids), list(named.lens_ids), named.top_k, named.prefix) == (
        [5, 6],
        [first.id, second.id],
        3,
        2,
    )


async def test_an_intervention_names_its_transcoder_by_the_lens_that_is_on_the_device(
    mesh: Mesh, host: FakeHost
) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    lens = await attach(mesh, group.id, "good")

    def generate(transcoder_id: str) -> models_pb2.GenerateTextRequest:
        steer = types.InterventionSpec(
            site="mlp_out",
            layer=2,
            op=types.InterventionSpec.OP_ADD,
            transcoder_id=transcoder_id,
            feature=5,
            factor=2.0,
        )
        plain = types.InterventionSpec(site="mlp_in", layer=1, op=types.InterventionSpec.OP_ZERO, positions=[3])
        return models_pb2.GenerateTextRequest(id=model.id, prompt="a", interventions=[steer, plain])

    await mesh.models.GenerateText(generate("good"))
    steered, zeroed = host.names("Generate")[0].interventions
    assert (steered.transcoder_id, steered.op, steered.feature, steered.factor) == (
        lens.id,
        types.InterventionSpec.OP_ADD,
        5,
        2.0,
    )
    assert (zeroed.site, list(zeroed.positions), zeroed.HasField("feature")) == ("mlp_in", [3], False)
    assert (await refused(mesh.models.GenerateText(generate("second")))).fields == ["interventions.transcoder_id"]

    def analyze(transcoder_id: str) -> pb.AnalyzeTextRequest:
        changes = generate(transcoder_id).interventions
        return pb.AnalyzeTextRequest(id=group.id, text="a", lens_ids=[lens.id], interventions=changes)

    await mesh.groups.AnalyzeText(analyze("good"))
    assert list(host.names("Analyze")[0].interventions) == [steered, zeroed]
    assert (await refused(mesh.groups.AnalyzeText(analyze("second")))).fields == ["interventions.transcoder_id"]


async def test_an_extension_is_activated_as_its_groups_lens_or_as_a_lens_of_its_own(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()

    async def activate(extension_id: str, files: str = "x_1") -> devices_pb2.SwitchExtensionResponse:
        return await mesh.placement.SwitchExtension(
            devices_pb2.SwitchExtensionRequest(
                model_id=model.id,
                extension_id=extension_id,
                artifact_uri=f"artifact://extension/{files}" if extension_id else "",
                base_digest="digest-tiny" if extension_id else "",
            )
        )

    done = await activate("x_1")
    assert (done.active_extension_id, done.seconds, done.memory_after_bytes) == ("x_1", 0.002, 6)
    assert host.held[model.id].active_lens_id == "x_1"
    assert await mesh.ledger() == (107 * MB, 0)
    await activate("x_1")
    assert await mesh.ledger() == (107 * MB, 0)
    assert (await activate("")).active_extension_id == ""
    assert host.held[model.id].active_lens_id == ""
    group, plain = await group_on(mesh, model.id), await group_on(mesh, model.id)
    reading = await attach(mesh, plain.id, "good")
    await switch(mesh, plain.id, reading.id)
    lens = await mesh.groups.AttachLens(
        pb.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_EXTENSION, extension_id="x_1")
    )
    await activate("x_1")
    assert host.held[model.id].active_lens_id == lens.id
    assert (await get(mesh, group.id)).active_lens_id == lens.id
    assert (await get(mesh, plain.id)).active_lens_id == reading.id  # reading lenses may be used beside it
    attached = len(host.names("AttachLens"))
    await activate("x_1")
    assert len(host.names("AttachLens")) == attached
    await activate("x_1", files="trained")
    assert host.names("AttachLens")[-1].lens.artifact_uri == "artifact://extension/trained"
    assert (await get(mesh, group.id)).lenses[0].artifact_uri == "artifact://extension/trained"
    await switch(mesh, plain.id, None)
    assert not (await get(mesh, group.id)).HasField("active_lens_id")  # only one altering lens, and now none


async def test_detaching_and_deleting_take_lenses_off_the_device(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    first, second = await attach(mesh, group.id, "good"), await attach(mesh, group.id, "second")
    await switch(mesh, group.id, first.id)
    detach = pb.DetachLensRequest(group_id=group.id, lens_id=first.id)
    await mesh.groups.DetachLens(detach)
    assert not (await get(mesh, group.id)).HasField("active_lens_id")
    assert await mesh.ledger() == (107 * MB, 0)
    assert (await refused(mesh.groups.DetachLens(detach))).code == "NOT_FOUND"
    in_use = await refused(mesh.models.DeleteModel(models_pb2.DeleteModelRequest(id=model.id)))
    assert (in_use.reason, in_use.facts["users"]) == ("IN_USE", f"group {group.id}")
    await mesh.groups.DeleteGroup(pb.DeleteGroupRequest(id=group.id))
    assert list(host.held[model.id].lenses) == []
    assert await mesh.ledger() == (100 * MB, 0)
    assert (await refused(get(mesh, group.id))).code == "NOT_FOUND"
    assert second.id in [request.lens_id for request in host.names("DetachLens")]


async def test_a_preload_brings_base_and_lenses_and_tells_each(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    group = await group_on(mesh, model.id)
    lenses = [await attach(mesh, group.id, name) for name in ("good", "second")]
    request = pb.PreloadGroupRequest(id=group.id, request_id="r1")
    started = await mesh.groups.PreloadGroup(request)
    assert await mesh.groups.PreloadGroup(request) == started
    assert started.total == 2
    job = await mesh.settled(started.task_id)
    assert (job.status, job.result["loaded"], list(job.result["failed"])) == (jobs_pb2.JOB_STATE_COMPLETED, 2, [])
    told = [(data["loaded"], data["progress"]) for name, data in await mesh.events(group.id)]
    assert told == [(0, pytest.approx(100 / 3)), (1, pytest.approx(200 / 3)), (2, 100)]
    assert {lens.lens_id for lens in host.held[model.id].lenses} == {lens.id for lens in lenses}


async def test_a_group_moves_with_its_lenses(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    lens = await attach(mesh, group.id, "good")
    gpu = await mesh.add_host(FakeHost(host_id="gpu", device="cuda:0", services=()))
    moved = await mesh.groups.MoveGroup(pb.MoveGroupRequest(id=group.id, device="cuda:0"))
    assert (moved.device, moved.fully_loaded) == ("gpu/cuda:0", True)
    assert [item.lens_id for item in gpu.held[model.id].lenses] == [lens.id]
    assert host.held == {}
    assert (await mesh.ledger(), await mesh.ledger("gpu")) == ((0, 0), (107 * MB, 0))


async def test_switches_of_many_clients_end_with_the_last_acknowledged_one(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    lenses = [(await attach(mesh, group.id, name)).id for name in ("good", "second")]
    acknowledged: list[str] = []

    async def client(number: int) -> None:
        for step in range(5):
            done = await switch(mesh, group.id, lenses[(number + step) % 2])
            acknowledged.append(done.lens_id)

    await asyncio.gather(*(client(number) for number in range(6)))
    assert len(acknowledged) == 30
    active = (await get(mesh, group.id)).active_lens_id
    assert host.held[model.id].active_lens_id == active
    switched = [data["lens_id"] for name, data in await mesh.events(group.id) if name == "group:switched"]
    assert Counter(switched) == Counter(acknowledged)
    told = iter(switched)  # what is overtaken needs no call, what is called is told in that order
    assert all(request.lens_id in told for request in host.names("SwitchLens"))
    assert switched[-1] == active


async def test_who_waits_for_the_same_turn_needs_one_call_and_fails_alone(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group, other = await group_on(mesh, model.id), await group_on(mesh, model.id)
    lenses = [(await attach(mesh, group.id, name)).id for name in ("good", "second", "good")]
    foreign = (await attach(mesh, other.id, "good")).id
    await switch(mesh, other.id, None)
    before, asked = len(host.names("SwitchLens")), mesh.asked_for("SwitchLens")
    async with mesh.database.transaction() as conn:
        await conn.execute("SELECT FROM groups WHERE id = $1 FOR UPDATE", group.id)
        first = asyncio.ensure_future(switch(mesh, group.id, lenses[0]))
        await eventually(lambda: blocked(mesh))
        others = [(group.id, lenses[1]), (group.id, foreign), (group.id, None), (other.id, foreign)]
        waiting = []
        for each in others:  # one by one: calls that are under way together may come in any order
            waiting.append(asyncio.ensure_future(switch(mesh, *each)))
            await eventually(lambda: mesh.asked_for("SwitchLens") == asked + 1 + len(waiting))
        assert await blocked(mesh) == 1  # nobody else holds a connection
    answers = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [getattr(answer, "lens_id", "refused") for answer in answers] == [
        lenses[0],
        lenses[1],
        "refused",
        "",
        foreign,
    ]
    assert len(host.names("SwitchLens")) - before == 2
    assert host.held[model.id].active_lens_id == foreign
    assert not (await get(mesh, group.id)).HasField("active_lens_id")
    assert (await get(mesh, other.id)).active_lens_id == foreign
    told = [data["lens_id"] for name, data in await mesh.events(group.id) if name == "group:switched"]
    assert told == [lenses[0], lenses[1], None]


async def test_a_lens_that_its_device_lost_spoils_nobody_elses_turn(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    group = await group_on(mesh, model.id)
    here, gone = [(await attach(mesh, group.id, name)).id for name in ("good", "second")]
    del host.held[model.id].lenses[1]
    async with mesh.database.transaction() as conn:
        await conn.execute("SELECT FROM groups WHERE id = $1 FOR UPDATE", group.id)
        calls = [asyncio.ensure_future(switch(mesh, group.id, None))]
        await eventually(lambda: blocked(mesh))
        calls += [asyncio.ensure_future(switch(mesh, group.id, each)) for each in (here, gone)]
        await eventually(lambda: mesh.asked_for("SwitchLens") == 3)
    base, found, lost = await asyncio.gather(*calls, return_exceptions=True)
    assert (base.lens_id, found.lens_id, lost.code()) == ("", here, grpc.StatusCode.NOT_FOUND)
    assert (await get(mesh, group.id)).active_lens_id == here == host.held[model.id].active_lens_id


async def blocked(mesh: Mesh) -> int:
    """How many connections of this database wait for a lock."""
    async with mesh.database.connection() as conn:
        return await conn.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
