"""The WebSocket of events: the first message, frames, resume, closing codes, clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.wire.gateway_support import Mesh, event, pb, running


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


async def closed(websocket: Any) -> tuple[int, list[Any]]:
    """The close code, and what came before it."""
    seen: list[Any] = []
    with contextlib.suppress(ConnectionClosed):
        async for message in websocket:
            seen.append(json.loads(message))
    return websocket.close_code, seen


async def test_events_are_frames_and_heartbeats_are_not(mesh: Mesh) -> None:
    mesh.zoo.events = [event(1, "model:loading", model_id="m_1", progress=45.5), event(0, "heartbeat"), event(2)]
    websocket = await mesh.subscribe(topics=["model:*", "extraction:ext_1"], after={"m_1": 2**53 + 1})
    first, second = json.loads(await websocket.recv()), json.loads(await websocket.recv())
    assert first == {"event": "model:loading", "data": {"model_id": "m_1", "progress": 45.5, "sequence": 1}}
    assert second == {"event": "animal:moved", "data": {"sequence": 2}}
    assert mesh.zoo.requests == [pb.WatchAllRequest(topics=["model:*", "extraction:ext_1"], after={"m_1": 2**53 + 1})]
    assert mesh.metrics.get_sample_value("gateway_ws_clients") == 1
    await websocket.close()
    await mesh.zoo.cancelled.wait()


async def test_what_a_client_says_later_means_nothing(mesh: Mesh) -> None:
    mesh.zoo.events = [event(1)]
    websocket = await mesh.subscribe()
    await websocket.send("hello")
    await websocket.send(b"\x00")
    assert json.loads(await websocket.recv())["data"]["sequence"] == 1
    await websocket.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("{", "VALIDATION_ERROR"),
        ("[]", "VALIDATION_ERROR"),
        (b"\x00", "VALIDATION_ERROR"),
        ("[" * 5000, "MESSAGE_TOO_LARGE"),
        ('{"topics": []}', "UNAUTHENTICATED"),
        ('{"token": 1}', "UNAUTHENTICATED"),
        ('{"token": "x.y.z", "topics": ["model:*"]}', "UNAUTHENTICATED"),
        ('{"token": TOKEN, "topic": ["model:*"]}', "VALIDATION_ERROR"),
        ('{"token": TOKEN, "after": {"m": "x"}}', "VALIDATION_ERROR"),
    ],
)
async def test_a_wrong_first_message_is_refused_with_a_reason(mesh: Mesh, first: str | bytes, code: str) -> None:
    websocket = await connect(f"ws://{mesh.address}/api/events", proxy=None)
    await websocket.send(first.replace("TOKEN", json.dumps(mesh.token())) if isinstance(first, str) else first)
    close, (frame,) = await closed(websocket)
    assert close == 1008
    assert frame["error"]["code"] == code
    assert mesh.zoo.requests == []


async def test_the_service_checks_the_scope_again(mesh: Mesh) -> None:
    close, (frame,) = await closed(await mesh.subscribe(token=mesh.token([])))
    assert (close, frame["error"]["code"]) == (1008, "SCOPE_MISSING")


async def test_a_service_that_stops_says_try_again(mesh: Mesh) -> None:
    websocket = await mesh.subscribe()
    await mesh.zoo.waiting.wait()
    await mesh.backend.stop(None)
    close, (frame,) = await closed(websocket)
    assert (close, frame["error"]["code"]) == (1013, "UNAVAILABLE")


async def test_a_stop_closes_the_connection(mesh: Mesh) -> None:
    mesh.zoo.events = [event(1)]
    websocket = await mesh.subscribe()
    await websocket.recv()
    mesh.gateway.end_streams()
    assert await closed(websocket) == (1000, [])


async def test_an_oversized_first_message_is_refused(mesh: Mesh) -> None:
    websocket = await connect(f"ws://{mesh.address}/api/events", proxy=None)
    await websocket.send("x" * 70_000)
    close, _ = await closed(websocket)
    assert close == 1009


async def test_another_path_has_no_websocket(mesh: Mesh) -> None:
    with pytest.raises(InvalidStatus) as caught:
        await connect(f"ws://{mesh.address}/api/animals", proxy=None)
    assert caught.value.response.status_code == 404
    assert json.loads(caught.value.response.body)["error"]["code"] == "ROUTE_NOT_FOUND"


async def test_a_client_that_does_not_read_is_dropped_with_1013_and_others_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, stream_stall_seconds=0.5) as mesh:
        mesh.zoo.events = [event(sequence, text="x" * 100_000) for sequence in range(1, 5000)]
        slow = await connect(f"ws://{mesh.address}/api/events", proxy=None, max_queue=1)
        await slow.send(json.dumps({"token": mesh.token()}))
        await mesh.http.get("/api/animals/7", headers=mesh.bearer())
        while mesh.metrics.get_sample_value("gateway_slow_clients_dropped_total") == 0:
            other = await mesh.http.get("/api/animals/7", headers=mesh.bearer())
            assert other.status_code == 200
        assert mesh.zoo.sent < 2000
        code, frames = await closed(slow)
        assert code == 1013
        assert frames[-1]["error"]["code"] == "QUEUE_FULL"
        sequences = [frame["data"]["sequence"] for frame in frames[:-1]]
        assert sequences == list(range(1, len(sequences) + 1))


async def test_many_clients_share_the_gateway(mesh: Mesh) -> None:
    mesh.zoo.events = [event(sequence) for sequence in range(1, 101)]

    async def follow() -> list[int]:
        websocket = await mesh.subscribe()
        seen = [json.loads(await websocket.recv())["data"]["sequence"] for _ in range(100)]
        await websocket.close()
        return seen

    assert await asyncio.gather(*(follow() for _ in range(30))) == [list(range(1, 101))] * 30
