"""What a job is: its columns and states, and the exceptions that end a handler early."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from services.kit import errors


class StaleLease(errors.Stale):
    """Another worker may hold this job by now: nothing was written."""

    default_reason = "STALE_LEASE"


class Interrupted(Exception):
    """The handler was asked to stop; its state so far may be kept."""


class Cancelled(Interrupted):
    """The job was cancelled: drop what is half done."""


class Paused(Interrupted):
    """The job was paused or its process drains: save a checkpoint, it will be claimed again."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the table `jobs`, as it was when read."""

    LEASED: ClassVar[frozenset[str]] = frozenset({"running", "finalizing"})
    ENDED: ClassVar[frozenset[str]] = frozenset({"completed", "failed", "cancelled"})

    id: str
    """`job_…`, or what its creator chose."""
    kind: str
    """Names the handler: `extraction`, `training`, …"""
    state: str
    """queued, running, finalizing, paused, completed, failed, cancelled."""
    device: str | None
    """Device that must run it; None is any."""
    priority: int
    """Higher goes first."""
    payload: dict[str, Any]
    """What to do; written once."""
    progress: float
    """0 to 100."""
    detail: dict[str, Any]
    """Figures of the progress."""
    result: dict[str, Any]
    """What the handler returned."""
    fence: int
    """How often it was claimed; a write under another number is refused."""
    attempt: int
    """How often it was started since it was queued, resumed or retried by a person."""
    owner: str | None
    """Incarnation of the worker that holds its lease."""
    cancel_requested: bool
    pause_requested: bool
    waiting_for: str | None
    """What a queued job, or a running one's handler, waits for, in words."""
    error_code: str | None
    """Reason of the last failure, also while a next attempt is due."""
    error_message: str | None
    """Sentence to that."""
    resource_id: str
    """The resource it works for; its events' id."""
    event_prefix: str
    """First part of its events' names."""
    event_data: dict[str, Any]
    """Facts that every event of this job carries."""
    created_by: str
    created_at: datetime
    started_at: datetime | None
    """First claim."""
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        """Nothing happens to it any more, unless a person retries it."""
        return self.state in self.ENDED
