"""Health, readiness, metrics, the OpenAPI document and its reader, CORS, the access log."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.wire.gateway_support import Mesh, running


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


async def test_health_needs_nothing_and_readiness_every_backend(mesh: Mesh) -> None:
    await mesh.health.report({"database": "PostgreSQL does not answer", "café": "schließt"})
    alive = await mesh.http.get("/healthz")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    waiting = await mesh.http.get("/readyz")
    assert waiting.status_code == 503
    said = "database: PostgreSQL does not answer; caf?: schlie?t"
    assert waiting.json() == {"status": "not ready", "backends": {"zoo.v1": said}}
    await mesh.health.report({})
    ready = await mesh.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "backends": {"zoo.v1": "ready"}})


async def test_metrics_count_by_template_method_and_code(mesh: Mesh) -> None:
    for path in ("/api/animals/1", "/api/animals/2", "/api/nothing/1", "/api/nothing/2"):
        await mesh.http.get(path, headers=mesh.bearer())
    await mesh.http.request("BREW", "/api/animals/1")
    await mesh.http.get("/api/animals/1")
    text = (await mesh.http.get("/metrics")).text
    assert 'http_requests_total{code="200",method="GET",route="/api/animals/{id}"} 2.0' in text
    assert 'http_requests_total{code="404",method="GET",route="other"} 2.0' in text
    assert 'http_requests_total{code="405",method="other",route="other"} 1.0' in text
    assert 'http_requests_total{code="201",method="POST",route="/api/animals"} 0.0' in text
    assert 'http_request_duration_seconds_count{method="GET",route="/api/animals/{id}"} 3.0' in text
    assert 'auth_failures_total{reason="missing"} 1.0' in text
    assert "gateway_ws_clients 0.0" in text
    assert "gateway_streams 0.0" in text
    assert "nothing" not in text


async def test_each_exchange_is_logged_once_without_secrets(mesh: Mesh) -> None:
    with capture_logs() as logs:
        await mesh.http.get("/api/animals/secret-id?read_mask=id", headers=mesh.bearer())
    (line,) = [one for one in logs if one["event"] == "http request"]
    assert line["route"] == "/api/animals/{id}"
    assert (line["method"], line["status"], line["subject"], line["client"]) == ("GET", 200, "ann", "127.0.0.1")
    assert line["seconds"] > 0
    assert "secret-id" not in str(line)
    assert "Bearer" not in str(line)


async def test_cors_is_closed_unless_set(tmp_path: Path) -> None:
    wish = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with running(tmp_path) as mesh:
        closed = await mesh.http.options("/api/animals", headers=wish)
        assert closed.status_code == 405
        assert "access-control-allow-origin" not in (await mesh.http.get("/healthz", headers=wish)).headers
    async with running(tmp_path, cors_origins=["https://a.example"]) as mesh:
        wish |= {"access-control-request-headers": "authorization, idempotency-key"}
        allowed = await mesh.http.options("/api/animals", headers=wish)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other = await mesh.http.get("/healthz", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def document(mesh: Mesh) -> dict[str, Any]:
    answer = await mesh.http.get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    made: dict[str, Any] = answer.json()
    return made


async def test_openapi_describes_operations(mesh: Mesh) -> None:
    made = await document(mesh)
    assert made["openapi"] == "3.1.0"
    create = made["paths"]["/api/animals"]["post"]
    assert create["operationId"] == "ZooService_CreateAnimal"
    assert create["description"] == "Makes an animal. It takes a while."
    assert create["summary"] == "Makes an animal"
    assert create["security"] == [{"bearer": ["model:write"]}]
    assert create["x-rate-class"] == "create"
    assert {"201", "200", "400", "401", "403", "404", "409", "413", "415", "429", "500", "503"} <= set(
        create["responses"]
    )
    assert "security" not in made["paths"]["/api/names"]["get"]
    assert set(made["paths"]["/api/animals/{id}"]) == {"get", "delete", "patch"}
    assert "/api/devices/{name}/clear" in made["paths"]
    assert made["paths"]["/api/v2/animals/{id}"]["get"]["operationId"] == "ZooService_GetAnimal_2"
    assert "/api/events" not in made["paths"]
    assert made["x-websocket"]["first_message"]["required"] == ["token"]
    assert not any("Secret" in str(item) for item in made["paths"].values())


async def test_openapi_describes_fields(mesh: Mesh) -> None:
    made = await document(mesh)
    schemas = made["components"]["schemas"]
    fields = schemas["zoo.v1.Animal.Input"]["properties"]
    assert fields["name"] == {
        "type": "string",
        "minLength": 1,
        "maxLength": 20,
        "pattern": "^[a-z]+$",
        "description": "Name of the animal.",
    }
    assert fields["kind"]["enum"] == ["cat", "big_dog"]
    assert (fields["grams"]["minimum"], fields["grams"]["maximum"]) == (1, 9007199254740993)
    assert (fields["legs"]["exclusiveMinimum"], fields["legs"]["exclusiveMaximum"]) == (-1, 100)
    assert fields["id"]["readOnly"] is True
    assert fields["born_at"]["format"] == "date-time"
    assert fields["young"]["items"] == {"$ref": "#/components/schemas/zoo.v1.Animal.Input"}
    assert fields["young"]["maxItems"] == 3
    assert fields["tags"] == {
        "type": ["array", "null"],
        "items": {"type": "string", "maxLength": 9},
        "maxItems": 5,
        "uniqueItems": True,
        "description": "Labels.",
    }
    assert schemas["zoo.v1.Animal.Input"]["required"] == ["name", "kind", "grams"]
    assert schemas["zoo.v1.Animal.Input"]["additionalProperties"] is False
    assert schemas["zoo.v1.Animal"]["required"] == ["id", "name", "grams", "young", "tags"]
    parameters = {one["name"]: one for one in made["paths"]["/api/animals"]["get"]["parameters"]}
    assert {"filter.kind", "filter.born_after", "filter.heavier_than", "tags", "limit", "tame"} <= set(parameters)
    assert "labels" not in parameters
    assert parameters["limit"]["schema"]["maximum"] == 500
    switch = made["paths"]["/api/v2/groups/{id}/switch"]["post"]
    assert list(switch["requestBody"]["content"]["application/json"]["schema"]["properties"]) == ["lens_id"]
    events = made["paths"]["/api/animals/{id}/events"]["get"]
    assert set(events["responses"]["200"]["content"]) == {"text/event-stream", "application/x-ndjson"}
    assert "206" in made["paths"]["/api/files/{name}"]["get"]["responses"]
    assert "VALIDATION_ERROR" in schemas["Error"]["properties"]["error"]["properties"]["code"]["enum"]


async def test_every_reference_of_the_document_leads_somewhere(mesh: Mesh) -> None:
    made = await document(mesh)
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(made))):
        node: Any = made
        for key in reference.split("/"):
            node = node[key]
        assert node


async def test_the_reader_loads_nothing_from_elsewhere(mesh: Mesh) -> None:
    answer = await mesh.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    script = re.search(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
