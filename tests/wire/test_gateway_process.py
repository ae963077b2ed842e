"""`python -m gateway` as a process: what it needs, what it says, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway.listener import listen
from tests.support import free_port
from tests.unit.gateway import zoo_stubs
from tests.wire.gateway_support import running

ROOT = Path(__file__).parents[2]


async def start(tmp_path: Path, **settings: str) -> Process:
    stubs = Path(zoo_stubs.module("zoo.v1.zoo_pb2").__file__ or "").parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LENSMESH_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{stubs}", "LENSMESH_STATE_DIR": str(tmp_path)}
    environment |= {f"LENSMESH_{name}": value for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE
    )


async def refused(process: Process) -> str:
    """The one line that a process says before it ends with a failure."""
    out, err = await process.communicate()
    assert process.returncode == 1
    assert out == b""
    assert err.count(b"\n") == 1
    return err.decode().strip()


@asynccontextmanager
async def listening(process: Process) -> AsyncIterator[str]:
    """The base URL, once the process has logged it."""
    assert process.stderr is not None
    try:
        while (line := json.loads(await process.stderr.readline()))["event"] != "listening":
            pass
        yield f"http://{line['address']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = await refused(await start(tmp_path, HTTP_LISTEN=address, BACKENDS=f"zoo.v1=127.0.0.1:{free_port()}"))
    assert said == f"lensmesh gateway: cannot listen on {address}: address already in use"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "set LENSMESH_BACKENDS"),
        ({"BACKENDS": "zoo.v1"}, "LENSMESH_BACKENDS"),
        ({"BACKENDS": "zoo.v1=nowhere"}, "is not host:port"),
        ({"BACKENDS": "zoo.v1=a:1,zoo.v1=b:1"}, "two addresses"),
        ({"BACKENDS": "nowhere.v1=127.0.0.1:1"}, "no stubs are installed for the proto package 'nowhere.v1'"),
        ({"BACKENDS": "zoo.v1=127.0.0.1:1", "HTTP_LISTEN": "8080"}, "LENSMESH_HTTP_LISTEN"),
        ({"BACKENDS": "zoo.v1=127.0.0.1:1", "HTTP_MAX_BODY": "much"}, "LENSMESH_HTTP_MAX_BODY"),
        ({"BACKENDS": "zoo.v1=127.0.0.1:1", "HTTP_LISTEN": "192.0.2.1:80"}, "cannot listen on 192.0.2.1:80"),
    ],
)
async def test_wrong_settings_are_one_line(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    assert said in await refused(await start(tmp_path, **{"HTTP_LISTEN": "127.0.0.1:0"} | settings))


async def test_unsafe_annotations_stop_the_start(tmp_path: Path) -> None:
    process = await start(tmp_path, HTTP_LISTEN="127.0.0.1:0", BACKENDS="broken.v1=127.0.0.1:1")
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"broken.v1.BrokenService.NoPolicy: has an HTTP binding and no (lensmesh.http.v1.policy)" in err


async def test_it_serves_what_the_stubs_say_and_drains_on_sigterm(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        process = await start(
            tmp_path, HTTP_LISTEN="127.0.0.1:0", BACKENDS=f"zoo.v1={mesh.settings.backends['zoo.v1']}"
        )
        async with (
            listening(process) as url,
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
            client.stream("GET", "/api/animals/endless/events?count=1", headers=mesh.bearer()) as stream,
        ):
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/api/animals/7", headers=mesh.bearer())).json()["id"] == "7"
            lines = stream.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            assert [line async for line in lines]
            assert await process.wait() == 0
        await mesh.zoo.cancelled.wait()


def test_the_kernel_drops_what_we_cannot_close() -> None:
    with (
        listen("127.0.0.1:0", stall_seconds=7) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 22_000
