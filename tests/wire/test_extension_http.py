"""A continuation over HTTP: the gateway in front of the extension service streams it as server-sent events."""

from __future__ import annotations

import json
from pathlib import Path

from lensmesh.extensions.v1 import extensions_pb2 as pb
from prometheus_client import CollectorRegistry

from gateway import comments, stubs
from gateway.app import Gateway
from gateway.config import GatewaySettings
from services.kit import auth
from tests.support import eventually
from tests.wire.extensions_support import MODEL, Mesh
from tests.wire.gateway_support import listening
from tests.wire.test_extensions import create, mesh
from tests.wire.test_gateway_stream import frames

__all__ = ["mesh"]
PACKAGE = "lensmesh.extensions.v1"


async def test_a_continuation_is_streamed_as_server_sent_events(mesh: Mesh, tmp_path: Path) -> None:
    made = await create(mesh)
    wanted = {"prompt": "def add", "max_new_tokens": 24, "temperature": 8.0, "seed": 3}
    whole = await mesh.stub.GenerateWithExtension(pb.GenerateWithExtensionRequest(id=made.id, **wanted))
    settings = GatewaySettings(state_dir=tmp_path / "state", backends={PACKAGE: mesh.registry.address})
    settings.jwt_keys.write_bytes(b"0123456789abcdef0123456789abcdef\n")
    facts = {"issuer": settings.jwt_issuer, "audience": settings.jwt_audience, "lifetime_seconds": 600}
    token = auth.mint(settings.jwt_keys, subject="ann", permissions=["model:read"], **facts)
    headers = {"authorization": f"Bearer {token}", "accept": "text/event-stream"}
    gateway = Gateway(settings, stubs.load([PACKAGE]), comments.load(), CollectorRegistry())
    path = f"/api/extensions/{made.id}/generate-stream"
    async with listening(gateway, settings) as (_, http):
        answer = await http.post(path, json=wanted, headers=headers)
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        parts = [json.loads(frame["data"]) for frame in frames(answer.text)]
        assert [part["token_ids"] for part in parts] == [[token] for token in whole.token_ids]
        assert "".join(part["text"] for part in parts) == whole.text

        async with http.stream("POST", path, json=wanted | {"max_new_tokens": 4000}, headers=headers) as begun:
            await anext(begun.aiter_lines())

        async def idle() -> bool:
            return mesh.context.residency.get(MODEL).leases == 0

        await eventually(idle)
        none = await http.post("/api/extensions/x_none/generate-stream", json=wanted, headers=headers)
        assert (none.status_code, none.json()["error"]["code"]) == (404, "NOT_FOUND")
