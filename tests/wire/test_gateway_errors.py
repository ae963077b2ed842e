"""Errors: every status of the contract, the envelope, deadlines, and services that are away."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.wire.gateway_support import Mesh, running, serve_zoo


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("Invalid", 400, "VALIDATION_ERROR"),
        ("NotFound", 404, "NOT_FOUND"),
        ("NotFound.MODEL_NOT_FOUND", 404, "MODEL_NOT_FOUND"),
        ("Conflict", 409, "WRONG_STATE"),
        ("Conflict.IN_USE", 409, "IN_USE"),
        ("Stale", 409, "STALE_ETAG"),
        ("AlreadyExists", 409, "ALREADY_EXISTS"),
        ("Forbidden", 403, "SCOPE_MISSING"),
        ("Exhausted", 429, "QUOTA_EXCEEDED"),
        ("Exhausted.INSUFFICIENT_MEMORY", 500, "INSUFFICIENT_MEMORY"),
        ("Failed.MODEL_LOAD_FAILED", 500, "MODEL_LOAD_FAILED"),
        ("Unavailable.MODEL_LOAD_FAILED", 500, "MODEL_LOAD_FAILED"),
        ("Failed.EXTRACTION_FAILED", 500, "EXTRACTION_FAILED"),
        ("TooLarge", 413, "MESSAGE_TOO_LARGE"),
        ("Unavailable.DATABASE_UNAVAILABLE", 503, "DATABASE_UNAVAILABLE"),
        ("DeadlineExceeded", 504, "DEADLINE_EXCEEDED"),
        ("Unsupported", 501, "UNSUPPORTED"),
        ("plain.UNKNOWN", 500, "INTERNAL"),
        ("plain.DATA_LOSS", 500, "INTERNAL"),
        ("plain.UNAVAILABLE", 503, "UNAVAILABLE"),
        ("plain.NOT_FOUND", 404, "NOT_FOUND"),
        ("plain.CANCELLED", 499, "CANCELLED"),
        ("crash", 500, "INTERNAL"),
    ],
)
async def test_statuses_follow_the_reason_then_the_code(mesh: Mesh, kind: str, status: int, code: str) -> None:
    answer = await mesh.http.post(f"/api/fail/{kind}", headers=mesh.bearer() | {"x-request-id": "r-1"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"code", "message", "details", "timestamp", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"] == "r-1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", error["timestamp"])
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    for secret in ("10.0.0.1", "/work", "secret", "Traceback", "Error at"):
        assert secret not in answer.text


async def test_metadata_are_details_and_numbers_where_they_read_as_such(mesh: Mesh) -> None:
    metadata = {"required_memory_gb": "8.5", "available_memory_gb": "6", "model_id": "m_1", "zip": "007", "wait": "1"}
    answer = await mesh.http.post(
        "/api/fail/Exhausted.INSUFFICIENT_MEMORY", json={"metadata": metadata}, headers=mesh.bearer()
    )
    wanted = {"required_memory_gb": 8.5, "available_memory_gb": 6, "model_id": "m_1", "zip": "007", "wait": 1}
    assert answer.json()["error"]["details"] == wanted


async def test_retry_after_is_the_service_s(mesh: Mesh) -> None:
    answer = await mesh.http.post("/api/fail/Unavailable", json={"metadata": {"wait": "1"}}, headers=mesh.bearer())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that refuses connections, kept from servers of other tests."""
    with held("127.0.0.1:0") as address:
        yield address


@contextmanager
def held(address: str) -> Iterator[str]:
    """A port that nobody listens on and that no other test's server is given."""
    host, _, port = address.rpartition(":")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, int(port)))
        yield f"{host}:{holder.getsockname()[1]}"


async def test_a_backend_that_is_down_is_503(tmp_path: Path, nobody: str) -> None:
    async with running(tmp_path, backends={"zoo.v1": nobody}) as mesh:
        answer = await mesh.http.get("/api/animals/7", headers=mesh.bearer())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "UNAVAILABLE")
        assert "127.0.0.1" not in answer.text
        assert answer.headers["retry-after"] == "1"
        ready = await mesh.http.get("/readyz")
        assert (ready.status_code, ready.json()["backends"]) == (503, {"zoo.v1": "does not answer"})


async def test_a_backend_that_comes_back_is_found_again(mesh: Mesh) -> None:
    assert (await mesh.http.get("/api/animals/7", headers=mesh.bearer())).status_code == 200
    await mesh.backend.stop(None)
    with held(mesh.settings.backends["zoo.v1"]) as address:
        assert (await mesh.http.get("/api/animals/7", headers=mesh.bearer())).status_code == 503
        again, _, _ = await serve_zoo(mesh.zoo, mesh.settings, address)
    while (await mesh.http.get("/api/animals/7", headers=mesh.bearer())).status_code == 503:
        pass
    assert (await mesh.http.get("/readyz")).status_code == 200
    await again.stop(None)


async def test_a_package_without_a_backend_is_503(tmp_path: Path, nobody: str) -> None:
    async with running(tmp_path, backends={"elsewhere.v1": nobody}) as mesh:
        answer = await mesh.http.get("/api/animals/7", headers=mesh.bearer())
    assert answer.status_code == 503
    assert "zoo.v1" in answer.json()["error"]["message"]


@pytest.mark.parametrize("how", ["header", "default"])
async def test_the_deadline_is_the_client_s_or_the_default(tmp_path: Path, how: str) -> None:
    async with running(tmp_path, http_timeout_seconds=0.3 if how == "default" else 60) as mesh:
        headers = mesh.bearer() | ({"x-request-timeout": "0.3"} if how == "header" else {})
        answer = await mesh.http.get("/api/hang/x", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
        await mesh.zoo.cancelled.wait()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", ""])
async def test_a_wrong_deadline_is_refused(mesh: Mesh, value: str) -> None:
    answer = await mesh.http.get("/api/animals/7", headers=mesh.bearer() | {"x-request-timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field_violations"][0]["field"] == "X-Request-Timeout"


async def test_a_client_that_hangs_up_cancels_the_call(mesh: Mesh) -> None:
    asking = asyncio.create_task(mesh.http.get("/api/hang/x", headers=mesh.bearer()))
    await mesh.zoo.waiting.wait()
    asking.cancel()
    with pytest.raises((asyncio.CancelledError, httpx.HTTPError)):
        await asking
    await mesh.zoo.cancelled.wait()
