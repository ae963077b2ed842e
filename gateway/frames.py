"""One message of a server stream as SSE, NDJSON or a WebSocket frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from starlette.datastructures import Headers

from gateway.encode import encode
from gateway.errors import Failure

AFTER_FIELD = "after_sequence"
"""Request field that a resumed stream starts after; `Last-Event-ID` fills it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One event on its way to a client."""

    event: str
    id: str | None
    """Sequence to resume after; None for a snapshot, which is no event of its own."""
    data: Any
    heartbeat: bool = False
    """Says only that the stream lives."""

    def envelope(self) -> dict[str, Any]:
        """The frame of a WebSocket."""
        return {"event": self.event, "data": self.data}


def is_event(message_type: Any) -> bool:
    """Whether a message is an event envelope: a name, a sequence and free data."""
    fields = message_type.fields_by_name
    data = fields.get("data")
    has_data = data is not None and data.message_type is not None and data.message_type.full_name.endswith(".Struct")
    return "event" in fields and "sequence" in fields and has_data


def frame(message: Message) -> Frame:
    """The frame of a message; an event's sequence and time join its data, so that a client reads one object."""
    made = encode(message)
    if not is_event(message.DESCRIPTOR):
        return Frame("message", None, made)
    sequence, facts = made["sequence"], made.get("data", {})
    around = {"timestamp": made["timestamp"]} if "timestamp" in made else {}
    data = around | facts | {"sequence": sequence}
    return Frame(made["event"], str(sequence) if sequence else None, data, heartbeat=not sequence and not facts)


def error_frame(failure: Failure) -> Frame:
    """The last frame of a stream that failed."""
    return Frame("error", None, failure.body())


def wants_sse(headers: Headers, message_type: Any) -> bool:
    """SSE when asked for, and for event envelopes unless NDJSON is asked for."""
    accept = headers.get("accept", "*/*").lower()
    if "text/event-stream" in accept:
        return True
    return is_event(message_type) and "ndjson" not in accept
