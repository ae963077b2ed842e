from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from gateway import stubs
from services.client.api import ApiError, Event
from services.client.http import ROUTES, HttpApi

PACKAGES = ("lensmesh.registry.v1", "lensmesh.extraction.v1", "lensmesh.training.v1", "lensmesh.extensions.v1")
STREAM = (
    b": a comment\n\n"
    b'event: job:queued\nid: 1\ndata: {"job_id": "job_1"}\n\n'
    b'event: job:progress\nid: 2\ndata: {"progress":\ndata:  50}\n\n'
)
REFUSAL = {"error": {"code": "MODEL_NOT_FOUND", "message": "no such model", "details": {"id": "m_1"}}}


class Gateway(BaseHTTPRequestHandler):
    """Answers what the test put into `replies`, and keeps what it was asked."""

    url: ClassVar[str]
    replies: ClassVar[list[tuple[int, str, bytes]]]
    asked: ClassVar[list[tuple[str, str, dict[str, str], bytes]]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        status, content_type, reply = self.replies.pop(0)
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[type[Gateway]]:
    Gateway.replies, Gateway.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Gateway.url = f"http://127.0.0.1:{server.server_port}"
    yield Gateway
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(gateway: type[Gateway]) -> Iterator[HttpApi]:
    api = HttpApi(gateway.url, "secret")
    yield api
    api.close()


def test_every_route_is_the_one_that_its_proto_declares():
    declared = {
        method.descriptor.name: {(binding.verb, binding.template) for binding in method.bindings}
        for method in stubs.methods(stubs.load(PACKAGES))
    }
    assert {rpc: route in declared[rpc] for rpc, route in ROUTES.items()} == dict.fromkeys(ROUTES, True)


def test_path_fields_leave_the_body(gateway: type[Gateway], api: HttpApi):
    gateway.replies.append((201, "application/json", b'{"id": "lens_1"}'))
    assert api.call("AttachLens", group_id="grp_1", kind="logit_lens") == {"id": "lens_1"}
    ((verb, path, headers, body),) = gateway.asked
    assert (verb, path, json.loads(body)) == ("POST", "/api/v2/groups/grp_1/lenses", {"kind": "logit_lens"})
    assert headers["authorization"] == "Bearer secret"


def test_reads_and_deletes_send_their_fields_as_query(gateway: type[Gateway], api: HttpApi):
    gateway.replies.append((204, "application/json", b""))
    assert api.call("DeleteModel", id="m_1/..?", cascade=True) == {}
    assert gateway.asked[0][:2] == ("DELETE", "/api/models/m_1/..%3F?cascade=true")


def test_a_refusal_carries_code_and_details(gateway: type[Gateway], api: HttpApi):
    gateway.replies.append((404, "application/json", json.dumps(REFUSAL).encode()))
    with pytest.raises(ApiError, match="MODEL_NOT_FOUND: no such model") as raised:
        api.call("GetModel", id="m_1")
    assert raised.value.details == {"id": "m_1"}
    assert not raised.value.transient


def test_a_reply_that_is_not_ours_is_shown(gateway: type[Gateway], api: HttpApi):
    gateway.replies.append((502, "text/html", b"<h1>proxy</h1>"))
    with pytest.raises(ApiError, match="HTTP_502: <h1>proxy</h1>"):
        api.call("ListModels")


def test_nobody_there_is_transient():
    with pytest.raises(ApiError) as raised:
        HttpApi("http://127.0.0.1:1", "secret").call("ListModels")
    assert (raised.value.code, raised.value.transient) == ("UNREACHABLE", True)


def test_events_come_in_order_and_resume_after_the_last_one(gateway: type[Gateway], api: HttpApi):
    gateway.replies.append((200, "text/event-stream", STREAM))
    assert list(api.watch("WatchJob", id="job_1", after_sequence=7)) == [
        Event("job:queued", 1, {"job_id": "job_1"}),
        Event("job:progress", 2, {"progress": 50}),
    ]
    _, path, headers, _ = gateway.asked[0]
    assert path == "/api/jobs/job_1/events"
    assert headers["last-event-id"] == "7"
    assert headers["accept"] == "text/event-stream"


def test_a_stream_that_fails_says_why(gateway: type[Gateway], api: HttpApi):
    failing = STREAM + b"event: error\ndata: " + json.dumps(REFUSAL).encode() + b"\n\n"
    gateway.replies.append((200, "text/event-stream", failing))
    seen = []
    with pytest.raises(ApiError, match="MODEL_NOT_FOUND"):
        seen.extend(api.watch("WatchJob", id="job_1"))
    gateway.replies.append((404, "application/json", json.dumps(REFUSAL).encode()))
    with pytest.raises(ApiError, match="MODEL_NOT_FOUND"):
        list(api.watch("WatchJob", id="job_1"))
