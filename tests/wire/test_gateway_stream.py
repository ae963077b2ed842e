"""Server streams over HTTP: SSE with resume, NDJSON, bytes with ranges, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.wire.gateway_support import CONTENT, Mesh, running


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


def frames(text: str) -> list[dict[str, str]]:
    """The frames of an SSE stream, as the specification reads them; comments left out."""
    made = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in filter(None, block.split("\n")):
            name, _, value = line.partition(":")
            if name:
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name in fields else value
        if fields:
            made.append(fields)
    return made


async def test_events_are_sse_with_the_sequence_as_id(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/animals/a_1/events?count=3", headers=mesh.bearer())
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    seen = frames(answer.text)
    assert [(one["event"], one["id"]) for one in seen] == [("animal:moved", str(n)) for n in (1, 2, 3)]
    data = json.loads(seen[0]["data"])
    assert data == {"sequence": 1, "progress": 51, "message": "line\nline"}


async def test_a_snapshot_comes_first_and_moves_no_cursor(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/animals/known/events?count=1", headers=mesh.bearer())
    first, second = frames(answer.text)
    assert (first["event"], json.loads(first["data"])) == ("animal:snapshot", {"colour": "red", "sequence": 0})
    assert "id" not in first
    assert second["id"] == "1"


async def test_last_event_id_resumes(mesh: Mesh) -> None:
    headers = mesh.bearer() | {"last-event-id": "7", "accept": "text/event-stream"}
    answer = await mesh.http.get("/api/animals/a_1/events?count=2", headers=headers)
    assert [one["id"] for one in frames(answer.text)] == ["8", "9"]
    wrong = await mesh.http.get("/api/animals/a_1/events", headers=mesh.bearer() | {"last-event-id": "x"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["details"]["field_violations"][0]["field"] == "Last-Event-ID"


async def test_an_early_failure_has_its_own_status(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/animals/none/events", headers=mesh.bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")
    refused = await mesh.http.get("/api/animals/a/events", headers=mesh.bearer([]))
    assert refused.status_code == 403


async def test_a_late_failure_is_the_last_frame(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/animals/broken/events?count=1", headers=mesh.bearer())
    first, last = frames(answer.text)
    assert (first["event"], last["event"]) == ("animal:moved", "error")
    assert json.loads(last["data"])["error"]["code"] == "UNAVAILABLE"
    assert "id" not in last


async def test_a_silent_stream_sends_comments(tmp_path: Path) -> None:
    async with (
        running(tmp_path, stream_heartbeat_seconds=0.05) as mesh,
        mesh.http.stream("GET", "/api/animals/endless/events?count=1", headers=mesh.bearer()) as answer,
    ):
        lines = answer.aiter_lines()
        comments = 0
        while comments < 3:
            comments += (await anext(lines)).startswith(":")


async def test_a_stream_of_plain_messages_is_ndjson(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/count?to=3&fail=true", headers=mesh.bearer())
    assert answer.headers["content-type"] == "application/x-ndjson"
    *results, last = [json.loads(line) for line in answer.text.splitlines()]
    assert results == [{"result": {"number": number}} for number in (1, 2, 3)]
    assert last["error"]["code"] == "EXTRACTION_FAILED"
    as_sse = await mesh.http.get("/api/count?to=2", headers=mesh.bearer() | {"accept": "text/event-stream"})
    assert [json.loads(one["data"]) for one in frames(as_sse.text)] == [{"number": 1}, {"number": 2}]
    as_lines = await mesh.http.get(
        "/api/animals/a/events?count=1", headers=mesh.bearer() | {"accept": "application/x-ndjson"}
    )
    assert json.loads(as_lines.text.splitlines()[0])["result"]["event"] == "animal:moved"


async def test_a_long_stream_arrives_whole(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/count?to=5000", headers=mesh.bearer())
    assert [json.loads(line)["result"]["number"] for line in answer.text.splitlines()] == list(range(1, 5001))


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_client_that_leaves_ends_the_call(mesh: Mesh, accept: str) -> None:
    headers = mesh.bearer() | {"accept": accept}
    async with mesh.http.stream("GET", "/api/animals/endless/events?count=1", headers=headers) as answer:
        await anext(answer.aiter_lines())
        await mesh.zoo.waiting.wait()
    await mesh.zoo.cancelled.wait()


async def test_a_stop_does_not_wait_for_listeners(tmp_path: Path) -> None:
    async with running(tmp_path, drain_seconds=60) as mesh:
        url = f"http://{mesh.address}/api/animals/endless/events?count=1"
        async with (
            httpx.AsyncClient(trust_env=False, timeout=30) as client,
            client.stream("GET", url, headers=mesh.bearer()) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            mesh.gateway.end_streams()
            rest = [line async for line in lines]
            assert not any("error" in line for line in rest)


async def test_an_expired_token_ends_the_stream(mesh: Mesh) -> None:
    headers = mesh.bearer(lifetime_seconds=-59)
    async with mesh.http.stream("GET", "/api/animals/endless/events?count=1", headers=headers) as answer:
        text = "".join([chunk async for chunk in answer.aiter_text()])
    assert json.loads(frames(text)[-1]["data"])["error"]["code"] == "DEADLINE_EXCEEDED"


async def test_an_http_body_is_sent_as_it_is(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/pictures/x", headers=mesh.bearer() | {"accept-encoding": "gzip"})
    assert (answer.headers["content-type"], answer.content) == ("image/png", b"\x89PNG" * 1000)
    assert "content-encoding" not in answer.headers


async def test_bytes_come_whole_with_their_length(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/files/x", headers=mesh.bearer())
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["content-type"] == "application/x-safetensors"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert (answer.headers["accept-ranges"], answer.headers["etag"]) == ("bytes", '"abc"')
    missing = await mesh.http.get("/api/files/none", headers=mesh.bearer())
    assert missing.status_code == 404


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-99", 0, 99),
        ("bytes=50000-", 50000, 102399),
        ("bytes=102399-102399", 102399, 102399),
        ("bytes=5-999999999", 5, 102399),
    ],
)
async def test_a_range_is_206(mesh: Mesh, wanted: str, first: int, last: int) -> None:
    answer = await mesh.http.get("/api/files/x", headers=mesh.bearer() | {"range": wanted})
    assert (answer.status_code, answer.content) == (206, CONTENT[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("wanted", ["bytes=-5", "bytes=0-1,5-6", "lines=0-1", "bytes=9-3", "bytes=x-y"])
async def test_a_range_of_another_form_is_ignored(mesh: Mesh, wanted: str) -> None:
    answer = await mesh.http.get("/api/files/x", headers=mesh.bearer() | {"range": wanted})
    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_a_range_behind_the_end_is_416(mesh: Mesh) -> None:
    answer = await mesh.http.get("/api/files/x", headers=mesh.bearer() | {"range": f"bytes={len(CONTENT)}-"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "RANGE_NOT_SATISFIABLE")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_a_range_is_ignored_when_the_service_does_not_tell_the_size(mesh: Mesh) -> None:
    mesh.zoo.tells_total = False
    answer = await mesh.http.get("/api/files/x", headers=mesh.bearer() | {"range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_an_upload_is_the_body_as_it_is(mesh: Mesh) -> None:
    headers = mesh.bearer() | {"content-type": "application/x-safetensors"}
    answer = await mesh.http.put("/api/files/x?note=n", content=b"\x00\xff", headers=headers)
    made = answer.json()
    assert made == {"name": "x", "content_type": "application/x-safetensors", "data": "AP8=", "note": "n"}


async def test_a_client_that_does_not_read_is_dropped_and_costs_little(tmp_path: Path) -> None:
    async with running(tmp_path, stream_stall_seconds=0.5) as mesh:
        reader, writer = await asyncio.open_connection(*mesh.address.split(":"), limit=1024)
        head = f"GET /api/files/large HTTP/1.1\r\nhost: x\r\nauthorization: {mesh.bearer()['authorization']}"
        writer.write(f"{head}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n")
        while mesh.metrics.get_sample_value("gateway_slow_clients_dropped_total") == 0:
            other = await mesh.http.get("/api/count?to=10", headers=mesh.bearer())
            assert other.text.count("\n") == 10
        assert mesh.zoo.sent < 2000
        writer.close()
