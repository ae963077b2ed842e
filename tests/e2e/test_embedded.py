"""The database and the broker that `lensmesh up` brings along."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import nats
import nats.errors
import pytest

from services.runtime.errors import StartError
from services.runtime.keys import ensure_keys
from services.runtime.mesh import open_state
from services.runtime.nats import EmbeddedNats, find_nats_server
from services.runtime.ports import reserve_all
from services.runtime.postgres import EmbeddedPostgres
from services.runtime.process import Child, ProcessSpec
from tests.support import eventually


@pytest.fixture
def state(directory: Path) -> Path:
    open_state(directory)
    ensure_keys(directory / "keys")
    return directory


@pytest.fixture
async def children() -> AsyncIterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        await child.stop(signal.SIGKILL, 10)


async def started(spec: ProcessSpec, state: Path, children: list[Child]) -> Child:
    children.append(Child.start(spec, state / "logs" / f"{spec.name}.log"))

    async def ready() -> bool:
        return await spec.probe() is None

    await eventually(ready)
    return children[-1]


async def embedded_postgres(state: Path) -> tuple[EmbeddedPostgres, ProcessSpec]:
    postgres = EmbeddedPostgres(state, *reserve_all([("127.0.0.1", 0)]))
    return postgres, await postgres.prepare()


async def execute(url: str, sql: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def test_a_database_outlives_the_server_and_needs_its_password(state: Path, children: list[Child]):
    postgres, spec = await embedded_postgres(state)
    server = await started(spec, state, children)
    await execute(postgres.url, "CREATE TABLE kept AS SELECT 7 AS number")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.url, password="wrong")
    assert await server.stop(spec.stop_signal, 20)
    again, spec = await embedded_postgres(state)
    await started(spec, state, children)
    assert await execute(again.url, "SELECT number FROM kept") == 7


async def test_a_server_that_was_left_behind_is_used_again(state: Path, children: list[Child]):
    postgres, spec = await embedded_postgres(state)
    server = await started(spec, state, children)
    again, spec = await embedded_postgres(state)
    assert spec.adopt == server.pid
    assert again.url == postgres.url
    adopted = Child.adopt(server.pid)
    assert await adopted.stop(spec.stop_signal, 20)
    await server.wait()


async def test_a_pid_file_of_a_dead_server_does_not_point_at_a_stranger(state: Path, children: list[Child]):
    _, spec = await embedded_postgres(state)
    server = await started(spec, state, children)
    await server.stop(signal.SIGKILL, 20)
    pid_file = state / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    again, spec = await embedded_postgres(state)
    assert spec.adopt is None
    await started(spec, state, children)
    assert await execute(again.url, "SELECT 1") == 1


async def test_the_broker_has_jetstream_and_needs_its_token(state: Path, children: list[Child]):
    (port,) = reserve_all([("127.0.0.1", 0)])
    broker = EmbeddedNats(state, port)
    await started(broker.prepare(), state, children)
    client = await nats.connect(broker.url)
    stream = await client.jetstream().add_stream(name="KEPT", subjects=["kept.>"])
    assert stream.config.name == "KEPT"
    await client.close()
    with pytest.raises(nats.errors.Error):
        await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, connect_timeout=5)
    assert any((state / "nats").iterdir())


def test_without_a_broker_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("services.runtime.nats._SYSTEM_PATHS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match=r"apt-get install nats-server.*LENSMESH_NATS_URL"):
        find_nats_server()
