"""What users switch to next is brought before they ask, where there is room for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2, models_pb2

from services.kit.database import Database
from tests.support import eventually
from tests.wire.registry_support import MB, FakeHost, Mesh, running


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def group_of(mesh: Mesh, name: str) -> pb.Group:
    model = await mesh.create(name)
    return await mesh.groups.CreateGroup(pb.CreateGroupRequest(name=name, model_id=model.id))


async def switched(mesh: Mesh, group: pb.Group) -> pb.SwitchLensResponse:
    answer = await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group.id))
    if answer.job_id:
        assert (await mesh.settled(answer.job_id)).status == jobs_pb2.JOB_STATE_COMPLETED
    return answer


def foreseen(mesh: Mesh, result: str) -> float:
    value = mesh.context.metrics.get_sample_value("registry_foreseen_switches_total", {"result": result})
    assert value is not None
    return value


async def habit(mesh: Mesh, first: pb.Group, second: pb.Group) -> None:
    """The user has gone from the first group to the second one twice, and is at the second one."""
    for group in (first, second, first, second):
        await switched(mesh, group)

    async def known() -> bool:
        async with mesh.database.connection() as conn:
            return bool(await conn.fetchval("SELECT count(*) FROM habits WHERE times = 2"))

    await eventually(known)


async def test_the_next_group_of_a_habit_is_there_before_it_is_asked_for(mesh: Mesh) -> None:
    host = await mesh.add_host(FakeHost(sizes=dict.fromkeys("ab", 100 * MB)))
    first, second = await group_of(mesh, "a"), await group_of(mesh, "b")
    await habit(mesh, first, second)
    await mesh.models.UnloadModel(models_pb2.UnloadModelRequest(id=second.model_id))
    await switched(mesh, first)
    await mesh.reaches(second.model_id, models_pb2.MODEL_STATUS_READY)
    assert set(host.held) == {first.model_id, second.model_id}

    async def told() -> list[bool]:
        return [data["foreseen"] for name, data in await mesh.events(second.id) if name == "group:preload"]

    assert await eventually(told) == [True]
    hits = foreseen(mesh, "hit")
    assert not (await switched(mesh, second)).job_id
    assert (foreseen(mesh, "hit"), foreseen(mesh, "miss")) == (hits + 1, 0)


async def test_what_is_foreseen_takes_nobodys_place(mesh: Mesh) -> None:
    host = await mesh.add_host(FakeHost(sizes=dict.fromkeys("ab", 100 * MB), budget=150 * MB, park=250 * MB))
    first, second = await group_of(mesh, "a"), await group_of(mesh, "b")
    await habit(mesh, first, second)
    await switched(mesh, first)

    async def looked() -> bool:
        listed = await mesh.jobs.ListJobs(jobs_pb2.ListJobsRequest(kind="group_preload"))
        return [job.status for job in listed.jobs] == [jobs_pb2.JOB_STATE_COMPLETED] * len(listed.jobs) != []

    await eventually(looked)
    assert not host.held[first.model_id].parked
    assert host.held[second.model_id].parked
