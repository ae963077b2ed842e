"""Every error of the gateway and of the services behind it, as the one JSON envelope of the HTTP contract."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc

from services.kit.errors import LensmeshError
from services.kit.status import from_rpc_error
from services.kit.trace import current_request_id

STATUS_BY_REASON = {
    "MODEL_LOAD_FAILED": 500,
    "EXTRACTION_FAILED": 500,
    "INSUFFICIENT_MEMORY": 500,
    "MESSAGE_TOO_LARGE": 413,
    "ROUTE_NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "REQUEST_TIMEOUT": 408,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "RANGE_NOT_SATISFIABLE": 416,
    "CANCELLED": 499,
}
"""HTTP status by ErrorInfo reason, whatever the gRPC code."""

STATUS_BY_CODE = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by gRPC code; any other is 500."""

RETRY_AFTER = {429: 1.0, 503: 1.0}
"""Seconds in `Retry-After` of these statuses where the service named none."""

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True)
class Failure:
    """One error on its way to the client."""

    status: int
    code: str
    message: str
    details: dict[str, Any]
    headers: dict[str, str]

    def body(self) -> dict[str, Any]:
        """The envelope, with the current time and request id."""
        error = {
            "code": self.code,
            "message": self.message,
            "details": self.details,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "request_id": current_request_id(),
        }
        return {"error": error}


def failure(error: Exception) -> Failure:
    """What the client is told about an error; of one that nobody foresaw nothing but that it happened."""
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    if not isinstance(error, LensmeshError):
        return Failure(500, "INTERNAL", "the gateway failed; its log has the request id", {}, {})
    status = STATUS_BY_REASON.get(error.reason, STATUS_BY_CODE.get(error.code, 500))
    details: dict[str, Any] = {name: plain(str(value)) for name, value in sorted(error.metadata.items())}
    if error.violations:
        details["field_violations"] = [{"field": name, "description": said} for name, said in error.violations]
    return Failure(status, error.reason, error.message, details, _headers(status, error))


def plain(text: str) -> str | int | float:
    """Metadata is text on the wire; what reads as a JSON number is one."""
    if not _NUMBER.fullmatch(text):
        return text
    return float(text) if any(mark in text for mark in ".eE") else int(text)


def _headers(status: int, error: LensmeshError) -> dict[str, str]:
    made = {}
    wait = error.retry_after if error.retry_after is not None else RETRY_AFTER.get(status)
    if wait is not None:
        made["retry-after"] = str(max(1, round(wait)))
    if status == 401:
        made["www-authenticate"] = "Bearer"
    if status == 405:
        made["allow"] = str(error.metadata["allow"])
    if status == 416:
        made["content-range"] = f"bytes */{error.metadata['size']}"
    return made
