from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wire.gateway_support import Mesh, pb, running


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


async def test_create_answers_201_with_the_contract_s_json(mesh: Mesh) -> None:
    body = {"name": "tom", "kind": "big_dog", "grams": 2**53 + 1, "notes": {"a": [1, None, {"b": True}]}}
    answer = await mesh.http.post("/api/animals", json=body, headers=mesh.bearer())
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "id": "a_1",
        "name": "tom",
        "kind": "big_dog",
        "grams": 2**53 + 1,
        "born_at": "2025-10-06T10:00:00Z",
        "young": [],
        "notes": {"a": [1, None, {"b": True}]},
        "tags": [],
    }


async def test_validate_only_answers_200(mesh: Mesh) -> None:
    answer = await mesh.http.post("/api/animals", json={"name": "x", "validate_only": True}, headers=mesh.bearer())
    assert answer.status_code == 200


async def test_delete_answers_204_without_a_body(mesh: Mesh) -> None:
    answer = await mesh.http.delete("/api/animals/a%2Fb?cascade=true", headers=mesh.bearer())
    assert (answer.status_code, answer.content) == (204, b"")
    assert mesh.zoo.requests == [pb.DeleteAnimalRequest(id="a/b", cascade=True)]


async def test_path_query_and_body_reach_their_fields(mesh: Mesh) -> None:
    young = {"kind": "cat", "name": "kit", "grams": 1}
    animal = {"name": "tom", "kind": "cat", "grams": 5, "young": [young], "tags": ["a"]}
    answer = await mesh.http.patch("/api/animals/a_7", params={"reason": "why"}, json=animal, headers=mesh.bearer())
    assert answer.status_code == 200
    (request,) = mesh.zoo.requests
    assert (request.animal.id, request.animal.name, request.reason) == ("a_7", "tom", "why")
    assert answer.json()["young"][0]["kind"] == "cat"
    listed = await mesh.http.get("/api/animals?filter.kind=cat&tags=a&tags=b&limit=2&tame=true", headers=mesh.bearer())
    asked = listed.json()["asked"]
    assert asked["filter"] == {"kind": "cat"}
    assert (asked["tags"], asked["limit"], asked["tame"]) == (["a", "b"], 2, True)
    assert [one["grams"] for one in listed.json()["animals"]] == [2**53 + 1] * 2


async def test_other_bindings_and_verbs(mesh: Mesh) -> None:
    assert (await mesh.http.get("/api/v2/animals/7", headers=mesh.bearer())).json()["id"] == "animals/7"
    assert (await mesh.http.post("/api/animals/x:feed", headers=mesh.bearer())).json()["name"] == "x"
    cleared = await mesh.http.post("/api/devices/host/cuda:0/clear", json={}, headers=mesh.bearer())
    assert cleared.json()["name"] == "host/cuda:0"
    assert (await mesh.http.get("/api/names")).json() == ["tom", "jerry"]
    head = await mesh.http.head("/api/animals/7", headers=mesh.bearer())
    assert (head.status_code, head.content) == (200, b"")


async def test_null_is_unset_and_a_service_may_choose_202(mesh: Mesh) -> None:
    base = await mesh.http.post("/api/v2/groups/g/switch", json={"lens_id": None}, headers=mesh.bearer())
    assert (base.status_code, base.json()) == (200, {"id": "g"})
    far = await mesh.http.post("/api/v2/groups/g/switch", json={"lens_id": "far"}, headers=mesh.bearer())
    assert (far.status_code, far.json()) == (202, {"id": "g", "job_id": "job_1"})


async def test_a_read_mask_prunes_the_resource(mesh: Mesh) -> None:
    one = await mesh.http.get("/api/animals/7?read_mask=id,kind", headers=mesh.bearer())
    assert one.json() == {"id": "7", "kind": "cat"}
    page = await mesh.http.get("/api/animals?limit=2&read_mask=id", headers=mesh.bearer())
    assert page.json()["animals"] == [{"id": "a_0"}, {"id": "a_1"}]
    assert page.json()["total"] == 2
    for path in ("/api/animals/7?read_mask=id,nope", "/api/animals?read_mask=animals"):
        wrong = await mesh.http.get(path, headers=mesh.bearer())
        assert (wrong.status_code, wrong.json()["error"]["details"]["field_violations"][0]["field"]) == (
            400,
            "read_mask",
        )


async def test_the_idempotency_key_is_the_request_id(mesh: Mesh) -> None:
    headers = mesh.bearer() | {"idempotency-key": "k-1"}
    await mesh.http.post("/api/animals", json={"name": "x"}, headers=headers)
    assert mesh.zoo.requests[0].request_id == "k-1"
    other = await mesh.http.post("/api/animals", json={"name": "x", "request_id": "k-2"}, headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["details"]["field_violations"][0]["field"] == "request_id"


async def test_the_caller_s_token_and_ids_are_forwarded_and_nothing_else(mesh: Mesh) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = mesh.bearer() | {"traceparent": trace, "x-request-id": "req-7", "x-secret": "s", "cookie": "c=1"}
    answer = await mesh.http.get("/api/animals/7", headers=headers)
    assert answer.headers["x-request-id"] == "req-7"
    (seen,) = mesh.zoo.seen
    assert seen["authorization"] == headers["authorization"]
    assert seen["x-request-id"] == "req-7"
    assert seen["traceparent"].split("-")[1] == trace.split("-")[1]
    assert {"x-secret", "cookie"}.isdisjoint(seen)


@pytest.mark.parametrize("given", ["x" * 101, "a b", "é", ""])
async def test_a_malformed_request_id_is_replaced(mesh: Mesh, given: str) -> None:
    answer = await mesh.http.get("/healthz", headers={"x-request-id": given.encode("latin-1")})
    assert answer.headers["x-request-id"] not in ("", given)


async def test_large_replies_are_compressed_on_request(mesh: Mesh) -> None:
    headers = mesh.bearer() | {"accept-encoding": "br, gzip;q=0.8"}
    async with mesh.http.stream("GET", "/api/animals/7", headers=headers) as answer:
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["vary"] == "accept-encoding"
    assert json.loads(gzip.decompress(raw))["notes"]["colour"] == "x" * 2000
    for refused in ("identity", "gzip;q=0", "br"):
        plain = await mesh.http.get("/api/animals/7", headers=mesh.bearer() | {"accept-encoding": refused})
        assert "content-encoding" not in plain.headers
    small = await mesh.http.get("/api/names", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in small.headers


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/animals", {"nmae": "x"}, "nmae"),
        ("/api/animals", {"name": ""}, "name"),
        ("/api/animals", {"name": "x", "young": [{"tags": [1]}]}, "young[0].tags[0]"),
        ("/api/animals?name=y", {"name": "x"}, "name"),
        ("/api/v2/groups/g/switch", {"id": "h"}, "id"),
        ("/api/animals", [], "body"),
    ],
)
async def test_a_wrong_field_is_a_validation_error(mesh: Mesh, path: str, body: Any, field: str) -> None:
    answer = await mesh.http.post(path, json=body, headers=mesh.bearer())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "VALIDATION_ERROR"
    assert [one["field"] for one in error["details"]["field_violations"]] == [field]
    assert mesh.zoo.requests == []


async def test_unknown_routes_and_methods_use_the_envelope(mesh: Mesh) -> None:
    missing = await mesh.http.get("/api/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "ROUTE_NOT_FOUND")
    wrong = await mesh.http.put("/api/animals/7", json={}, headers=mesh.bearer())
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "GET, PATCH, DELETE"
    page = await mesh.http.post("/healthz")
    assert (page.status_code, page.headers["allow"]) == (405, "GET")
    not_utf8 = await mesh.http.get("/api/animals/%ff", headers=mesh.bearer())
    assert (not_utf8.status_code, not_utf8.json()["error"]["code"]) == (400, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": ""},
    ],
)
async def test_another_content_type_is_415(mesh: Mesh, headers: dict[str, str]) -> None:
    answer = await mesh.http.post("/api/animals", content=b'{"name": "x"}', headers=mesh.bearer() | headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_json_with_a_charset_is_accepted(mesh: Mesh) -> None:
    headers = mesh.bearer() | {"content-type": "application/json; charset=UTF-8"}
    answer = await mesh.http.post("/api/animals", content=b'{"name": "x"}', headers=headers)
    assert answer.status_code == 201


async def test_a_body_on_a_route_without_one_is_refused(mesh: Mesh) -> None:
    answer = await mesh.http.request("GET", "/api/animals/7", content=b"{}", headers=mesh.bearer())
    assert (answer.status_code, answer.json()["error"]["details"]["field_violations"][0]["field"]) == (400, "body")


async def test_bodies_over_the_limit_are_413(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with running(tmp_path, http_max_body=5000) as mesh:
        headers = mesh.bearer() | {"content-type": "application/json"}
        fits = await mesh.http.post("/api/animals", content=b'{"name": "x"}'.ljust(5000), headers=headers)
        assert fits.status_code == 201
        for content in (b" " * 5001, chunks()):
            answer = await mesh.http.post("/api/animals", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "MESSAGE_TOO_LARGE")
            assert answer.json()["error"]["details"] == {"max_bytes": 5000}


async def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(mesh: Mesh) -> None:
    reader, writer = await asyncio.open_connection(*mesh.address.split(":"))
    head = f"POST /api/animals HTTP/1.1\r\nhost: x\r\nauthorization: {mesh.bearer()['authorization']}\r\n"
    writer.write(f"{head}content-length: 1000000000000\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize("content", [b"[" * 50_000, b'{"notes":' * 40 + b"1" + b"}" * 40])
async def test_deep_bodies_are_413(mesh: Mesh, content: bytes) -> None:
    headers = mesh.bearer() | {"content-type": "application/json"}
    answer = await mesh.http.post("/api/echo", content=b'{"structure":' + content, headers=headers)
    assert answer.status_code in (400, 413)
    nested = b'{"structure":' + b'{"a":' * 40 + b"1" + b"}" * 41
    answer = await mesh.http.post("/api/echo", content=nested, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "MESSAGE_TOO_LARGE")


async def test_a_reply_larger_than_a_message_is_413(tmp_path: Path) -> None:
    async with running(tmp_path, http_max_body=20_000_000) as mesh:
        answer = await mesh.http.post("/api/echo", json={"string_field": "x" * 9_000_000}, headers=mesh.bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "MESSAGE_TOO_LARGE")


async def test_a_slow_body_is_408(tmp_path: Path) -> None:
    async with running(tmp_path, http_request_seconds=0.2) as mesh:
        reader, writer = await asyncio.open_connection(*mesh.address.split(":"))
        head = f"POST /api/animals HTTP/1.1\r\nhost: x\r\nauthorization: {mesh.bearer()['authorization']}\r\n"
        writer.write(f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode())
        answer = await reader.readuntil(b"\r\n")
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("begun", [b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: 1"])
async def test_slow_headers_are_dropped_on_new_and_old_connections(tmp_path: Path, begun: bytes, old: bool) -> None:
    async with running(tmp_path, http_request_seconds=0.2) as mesh:
        reader, writer = await asyncio.open_connection(*mesh.address.split(":"))
        if old:
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b'{"status":"ok"}')
        writer.write(begun)
        assert await reader.read() == b""
        writer.close()


async def test_a_silent_connection_is_dropped(tmp_path: Path) -> None:
    async with running(tmp_path, http_request_seconds=0.2) as mesh:
        reader, writer = await asyncio.open_connection(*mesh.address.split(":"))
        assert await reader.read() == b""
        writer.close()


async def test_a_flood_of_headers_is_refused(mesh: Mesh) -> None:
    reader, writer = await asyncio.open_connection(*mesh.address.split(":"))
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"x-many: 1\r\n" * 20_000)
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400 ")
    writer.close()
    assert (await mesh.http.get("/healthz")).status_code == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), path=st.sampled_from(["/api/animals", "/api/echo", "/api/v2/groups/g/switch"]))
async def test_random_bodies_never_crash_the_gateway(mesh: Mesh, data: bytes, path: str) -> None:
    headers = mesh.bearer() | {"content-type": "application/json"}
    answer = await mesh.http.post(path, content=data, headers=headers)
    assert answer.status_code < 500
    assert answer.status_code < 300 or set(answer.json()["error"]) == {
        "code",
        "message",
        "details",
        "timestamp",
        "request_id",
    }
