"""Jobs and events over gRPC: lists, snapshots, contiguous sequences, resuming, and the end of a watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.registry.v1 import jobs_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2_grpc, models_pb2

from services.kit import errors
from services.kit.database import Database
from tests.support import eventually
from tests.wire.registry_support import FakeHost, Mesh, refused, running


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


@pytest.fixture
async def host(mesh: Mesh) -> FakeHost:
    return await mesh.add_host(FakeHost())


async def until(stream: Any, name: str) -> list[Any]:
    """Messages up to the first event of a name."""
    seen = []
    async with asyncio.timeout(20):
        async for event in stream:
            seen.append(event)
            if event.event == name:
                return seen
    raise AssertionError(f"the stream ended before {name}: {[event.event for event in seen]}")


async def test_a_watched_job_shows_a_snapshot_then_every_event_and_ends(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.create()
    host.gate.clear()
    started = await mesh.load(model.id)
    await eventually(lambda: host.loading)
    stream = mesh.jobs.WatchJob(pb.WatchJobRequest(id=started.task_id))
    first = await stream.read()
    assert (first.event, first.sequence, first.resource_id) == ("load:snapshot", 0, started.task_id)
    assert (first.data["kind"], first.data["status"]) == ("model_load", "running")
    host.gate.set()
    async with asyncio.timeout(20):
        events = [event async for event in stream]  # it ends by itself
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.event for event in events] == ["load:queued", "load:started", "load:completed"]
    assert {event.data["model_id"] for event in events} == {model.id}
    later = mesh.jobs.WatchJob(pb.WatchJobRequest(id=started.task_id, after_sequence=1))
    async with asyncio.timeout(20):
        assert [event.sequence async for event in later] == [0, 2, 3]


async def test_a_job_that_has_ended_ends_its_watch(mesh: Mesh, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.registry.servicer.events.HEARTBEAT_SECONDS", 0.05)
    started = await mesh.load((await mesh.create()).id)
    await mesh.settled(started.task_id)
    stream = mesh.jobs.WatchJob(pb.WatchJobRequest(id=started.task_id, after_sequence=3))
    async with asyncio.timeout(20):
        assert [event.event async for event in stream] == ["load:snapshot"]


async def test_a_watched_model_shows_its_state_and_its_events_from_a_sequence(mesh: Mesh, host: FakeHost) -> None:
    model = await mesh.ready()
    total = len(await mesh.events(model.id))
    stream = mesh.models.WatchModel(models_pb2.WatchModelRequest(id=model.id, after_sequence=total - 2))
    seen = await until(stream, "model:ready")
    stream.cancel()
    assert [event.sequence for event in seen] == [0, total - 1, total]
    assert (seen[0].event, seen[0].data["status"]) == ("model:snapshot", "ready")
    assert seen[-1].data["memory_usage_bytes"] == 100_000_000
    assert (await refused(mesh.models.WatchModel(models_pb2.WatchModelRequest(id="m_no")).read())).code == "NOT_FOUND"


async def test_topics_are_followed_from_now_on_or_from_what_was_seen(mesh: Mesh, host: FakeHost) -> None:
    old = await mesh.ready()
    stream = mesh.events_stub.Watch(pb.WatchRequest(topics=["model:*"], after={old.id: 1}))
    replayed = await until(stream, "model:ready")
    assert [event.sequence for event in replayed] == list(range(2, len(replayed) + 2))
    new = await mesh.create("tiny", name="new")
    await mesh.load(new.id)
    fresh = await until(stream, "model:ready")
    stream.cancel()
    assert {event.resource_id for event in fresh} == {new.id}
    assert [event.sequence for event in fresh] == list(range(1, len(fresh) + 1))
    bad = mesh.events_stub.Watch(pb.WatchRequest(topics=["model"]))
    assert (await refused(bad.read())).code == "INVALID_ARGUMENT"


async def test_a_watcher_hears_a_heartbeat_while_nothing_happens(
    mesh: Mesh, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.registry.servicer.events.HEARTBEAT_SECONDS", 0.05)
    stream = mesh.events_stub.Watch(pb.WatchRequest(topics=["model:*"]))
    async with asyncio.timeout(20):
        beat = await stream.read()
    stream.cancel()
    assert (beat.event, beat.sequence) == ("mesh:heartbeat", 0)


async def test_jobs_are_listed_filtered_cancelled_and_retried(mesh: Mesh, host: FakeHost) -> None:
    host.load_errors = [errors.Failed("broken", reason="MODEL_LOAD_FAILED")]
    failed = (await mesh.load((await mesh.create()).id)).task_id
    await mesh.settled(failed)
    done = (await mesh.load((await mesh.create()).id)).task_id
    await mesh.settled(done)

    async def ids(**filters: Any) -> list[str]:
        return [job.id for job in (await mesh.jobs.ListJobs(pb.ListJobsRequest(**filters))).jobs]

    assert await ids() == [done, failed]
    assert await ids(status=pb.JOB_STATE_FAILED) == [failed]
    assert await ids(kind="model_load", limit=1) == [done]
    page = await mesh.jobs.ListJobs(pb.ListJobsRequest(limit=1))
    assert await ids(limit=1, page_token=page.next_page_token) == [failed]
    assert await ids(kind="training") == []
    job = await mesh.jobs.GetJob(pb.GetJobRequest(id=failed))
    assert (job.error_code, job.error_message, job.created_by) == ("MODEL_LOAD_FAILED", "broken", "ada")
    assert (await refused(mesh.jobs.CancelJob(pb.CancelJobRequest(id=done)))).reason == "WRONG_STATE"
    assert (await refused(mesh.jobs.RetryJob(pb.RetryJobRequest(id=done)))).reason == "WRONG_STATE"
    assert (await refused(mesh.jobs.GetJob(pb.GetJobRequest(id="job_none")))).code == "NOT_FOUND"


async def test_watching_needs_only_the_scope_to_read(mesh: Mesh, host: FakeHost) -> None:
    reader = jobs_pb2_grpc.JobServiceStub(mesh.as_user("bob", "model:read"))
    started = await mesh.load((await mesh.create()).id)
    await mesh.settled(started.task_id)
    async with asyncio.timeout(20):
        seen = [event.event async for event in reader.WatchJob(pb.WatchJobRequest(id=started.task_id))]
    assert seen[-1] == "load:completed"
    assert (await refused(reader.CancelJob(pb.CancelJobRequest(id=started.task_id)))).reason == "SCOPE_MISSING"
