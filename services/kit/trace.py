"""W3C trace context and request ids of the current call."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

import structlog

_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9_\-]{1,100}$")
_traceparent: ContextVar[str] = ContextVar("lensmesh_traceparent", default="")
_request_id: ContextVar[str] = ContextVar("lensmesh_request_id", default="")


def begin(traceparent: str | None, request_id: str | None) -> None:
    """Continue the caller's trace, or start one; bind both ids to this task's log lines."""
    match = _TRACEPARENT.match(traceparent or "")
    trace_id = match[1] if match else secrets.token_hex(16)
    _traceparent.set(f"00-{trace_id}-{secrets.token_hex(8)}-01")
    accepted = request_id if request_id and _REQUEST_ID.match(request_id) else "req_" + secrets.token_hex(8)
    _request_id.set(accepted)
    structlog.contextvars.bind_contextvars(trace_id=trace_id, request_id=accepted)


def current_trace() -> str:
    """`traceparent` of the current call; empty outside of one."""
    return _traceparent.get()


def current_request_id() -> str:
    """Request id of the current call; empty outside of one."""
    return _request_id.get()
