"""Jobs: rows that workers lease, with a fence that makes a lost lease harmless."""

from __future__ import annotations

from services.kit.jobs.claim import Claim, Handler
from services.kit.jobs.job import Cancelled, Interrupted, Job, Paused, StaleLease
from services.kit.jobs.store import JobStore
from services.kit.jobs.worker import Worker

__all__ = ["Cancelled", "Claim", "Handler", "Interrupted", "Job", "JobStore", "Paused", "StaleLease", "Worker"]
