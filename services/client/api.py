"""What a client of the mesh needs, whichever way it goes: calls by rpc name, fields as the HTTP contract has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

TERMINAL = ("completed", "failed", "cancelled")
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.5


class ApiError(Exception):
    """The mesh refused a call, or does not answer."""

    def __init__(self, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        """Keep what the mesh said.

        Args:
            code: ErrorInfo reason, or UNREACHABLE when nobody answered.
            message: sentence for a person.
            details: the reason's metadata and field violations.
        """
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or {}

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed a moment later."""
        return self.code in ("UNREACHABLE", "UNAVAILABLE", "DRAINING", "DATABASE_UNAVAILABLE", "BROKER_UNAVAILABLE")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one resource."""

    name: str
    """For example `training:progress`."""
    sequence: int
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        """Whether the resource's job has ended with it."""
        return self.name.rpartition(":")[2] in TERMINAL


class Api(Protocol):
    """A way into the mesh."""

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        """Call one method; fields and reply as the HTTP contract names them.

        Raises:
            ApiError: it was refused, or nobody answers.
        """
        ...

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        """Events of one resource, until the mesh ends the stream.

        Raises:
            ApiError: as `call`; also in the middle, when the connection is lost.
        """
        ...


def follow_job(api: Api, job_id: str) -> Iterator[Event]:
    """A job's events from its first to its terminal one, each once, across lost connections.

    Raises:
        ApiError: refused, or the mesh did not come back within a minute.
    """
    return _follow(api, "WatchJob", job_id, lambda event: event.terminal)


def follow_load(api: Api, model_id: str, task_id: str) -> Iterator[Event]:
    """The events of one load of a model until it is ready, failed or cancelled, as `follow_job`.

    Raises:
        ApiError: as `follow_job`.
    """

    def ends(event: Event) -> bool:
        last = ("model:ready", "model:failed", "model:unloaded")
        return event.data.get("task_id") == task_id and event.name in last

    for event in _follow(api, "WatchModel", model_id, ends):
        if event.data.get("task_id") == task_id:
            yield event


def _follow(api: Api, rpc: str, resource_id: str, ends: Callable[[Event], bool]) -> Iterator[Event]:
    after = 0
    lost: float | None = None
    while True:
        try:
            for event in api.watch(rpc, id=resource_id, after_sequence=after):
                lost = None
                if event.sequence <= after:
                    continue
                after = event.sequence
                yield event
                if ends(event):
                    return
            lost = None
        except ApiError as error:
            if error.code == "DEADLINE_EXCEEDED":  # of the stream, which may be silent for hours: open it again
                lost = None
            elif not error.transient:
                raise
            else:
                lost = time.monotonic() if lost is None else lost
                if time.monotonic() - lost > _PATIENCE_SECONDS:
                    raise
        time.sleep(_PAUSE_SECONDS)
