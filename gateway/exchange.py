"""What the gateway remembers of one HTTP exchange until its reply is complete."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers

from services.kit.auth import LEEWAY_SECONDS, Caller
from services.kit.errors import Invalid
from services.kit.trace import current_request_id, current_trace

Metadata = tuple[tuple[str, str], ...]
SCOPE_KEY = "lensmesh.exchange"
TIMEOUT_HEADER = "x-request-timeout"


class Ending(Protocol):
    """A call that must not outlive its exchange."""

    def end(self) -> None:
        """Stop it; its reader sees the end."""


@dataclass(eq=False)
class Exchange:
    """One exchange; the access log and the metrics read it when the reply is complete."""

    route: str = "other"
    """Path template; `other` for paths that no method has, so that metrics stay few."""
    subject: str = ""
    """Who the token speaks for."""
    expires: float | None = None
    """When the token stops to be accepted, seconds since the epoch."""
    open: list[Ending] = field(default_factory=list)
    """Streams that end with the exchange, however it ends."""

    def admit(self, caller: Caller) -> None:
        """Note who calls, and how long their token lasts."""
        self.subject = caller.subject
        self.expires = float(caller.claims["exp"]) + LEEWAY_SECONDS

    def seconds_left(self) -> float | None:
        """How long a stream may go on: it does not outlive the token that allowed it. None without a token."""
        return None if self.expires is None else max(1.0, self.expires - time.time())

    def end(self) -> None:
        """End the streams."""
        for one in self.open:
            one.end()


def call_metadata(authorization: str) -> Metadata:
    """GRPC metadata of a call: the caller's own token and the ids of the exchange, nothing else."""
    ids = (("x-request-id", current_request_id()), ("traceparent", current_trace()))
    return (("authorization", authorization), *ids) if authorization else ids


def deadline(headers: Headers, limit: float) -> float | None:
    """Seconds that the client allows (`X-Request-Timeout`), at most `limit`; None without the header.

    Raises:
        Invalid: the header is not a positive number.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise Invalid.of("X-Request-Timeout", "must be a positive number of seconds")
    return min(seconds, limit)
