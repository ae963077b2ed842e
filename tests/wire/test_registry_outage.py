"""PostgreSQL goes away and comes back: nothing that was acknowledged is lost, and everything goes on by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import models_pb2

from services.kit import errors, migrate
from services.kit.database import Database
from tests.support import PostgresServer, eventually, execute
from tests.wire.registry_support import MB, FakeHost, Mesh, refused, running


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """One of this test's own, to be stopped."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
async def mesh(server: PostgresServer, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    await execute(server.dsn.format("postgres"), "CREATE DATABASE outage")
    await migrate.upgrade(server.dsn.format("outage"))
    database = await Database.open(server.dsn.format("outage"))
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh
    await database.close()


async def test_a_registry_outlives_its_database(mesh: Mesh, server: PostgresServer) -> None:
    host = await mesh.add_host(FakeHost(sizes=dict.fromkeys("ab", 100 * MB)))
    ready = await mesh.ready("a")
    group = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name="g", model_id=ready.id))
    attach = pb.AttachLensRequest(group_id=group.id, kind=types.LENS_KIND_LOGIT_LENS)
    lens = await mesh.groups.AttachLens(attach)
    await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group.id, lens_id=lens.id))
    loading = await mesh.create("b")
    host.gate.clear()
    task_id = (await mesh.load(loading.id)).task_id
    await eventually(lambda: host.loading)

    await asyncio.to_thread(server.stop)
    for call in (
        mesh.get(ready.id),
        mesh.create("a"),
        mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group.id)),
    ):
        failure = await refused(call)
        assert (failure.code, failure.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
    with pytest.raises(errors.Unavailable):
        await mesh.database.ping()
    host.gate.set()  # the host does not wait for the database
    await eventually(lambda: loading.id in host.held)

    await asyncio.to_thread(server.start)
    assert (await mesh.settled(task_id)).error_message == ""
    assert (await mesh.reaches(loading.id, models_pb2.MODEL_STATUS_READY)).progress == 100
    assert [request.model_id for request in host.names("Load")] == [ready.id, loading.id]  # once each
    assert (await mesh.get(ready.id)).status == models_pb2.MODEL_STATUS_READY
    assert (await mesh.groups.GetGroup(pb.GetGroupRequest(id=group.id))).active_lens_id == lens.id
    assert await mesh.ledger() == (sum(held.memory_bytes for held in host.held.values()) + 7 * MB, 0)
    await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=group.id))
    assert host.held[ready.id].active_lens_id == ""

    async def relayed() -> bool:
        async with mesh.database.connection() as conn:
            return await conn.fetchval("SELECT count(*) FROM events WHERE relayed_at IS NULL") == 0

    await eventually(relayed)
    assert [name for name, _ in await mesh.events(loading.id)][-1] == "model:ready"
    assert not [task for task in mesh.tasks if task.done()]
