"""What makes a request recognisable when it is sent again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Who asks for what; no repetition is recognised while `request_id` is empty."""

    caller: str
    """Subject of the caller."""
    method: str
    """Full name of the rpc."""
    request_id: str
    """Chosen by the client."""
    digest: bytes
    """Of everything else in the request."""
