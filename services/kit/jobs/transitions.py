"""Every change of a job's state: one row update, its event and the wake-up of whoever waits for it, in one transaction.

The caller holds the row locked and has checked that the change is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import timedelta
from typing import Any

import asyncpg

from services.kit.database import load_queries
from services.kit.events import emit
from services.kit.jobs.job import Job

CHANNEL = "lensmesh_jobs"
"""PostgreSQL notification channel; the payload is a kind that has work or room, or `stop:<job id>`."""

QUERIES = load_queries(__file__)
_FIELDS = [field.name for field in fields(Job)]


def job_of(row: asyncpg.Record) -> Job:
    """The job of a row of `jobs` or `jobs_explained`."""
    return Job(**{name: row[name] for name in _FIELDS})


async def tell(conn: asyncpg.Connection, job: Job, what: str, data: Mapping[str, Any] | None = None) -> None:
    """Write the event `<prefix>:<what>` with the facts that all events of this job share."""
    facts = {
        "job_id": job.id,
        f"{job.event_prefix}_id": job.resource_id,
        **job.event_data,
        "status": job.state,
        "progress": job.progress,
    }
    await emit(conn, f"{job.event_prefix}:{what}", job.resource_id, {**facts, **(data or {})})


async def complete(conn: asyncpg.Connection, job: Job, result: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Running to completed; `data` goes into the event."""
    await _end(conn, job, "completed", result=result, data=data)


async def cancel(conn: asyncpg.Connection, job: Job) -> Job:
    """Any state that has not ended to cancelled."""
    return await _end(conn, job, "cancelled")


async def fail(conn: asyncpg.Connection, job: Job, code: str, message: str, details: Mapping[str, Any]) -> None:
    """Running to failed; `details` are the error's facts for programs."""
    failure = {"error_code": code, "error_message": message, "details": dict(details)}
    await _end(conn, job, "failed", code=code, message=message, data=failure)


async def pause(conn: asyncpg.Connection, job: Job) -> Job:
    """Queued or running to paused."""
    paused = job_of(await conn.fetchrow(QUERIES["pause"], job.id))
    await tell(conn, paused, "paused")
    await conn.execute(QUERIES["notify"], job.kind)
    return paused


async def again(
    conn: asyncpg.Connection,
    job: Job,
    event: str,
    *,
    attempt: int,
    delay: timedelta = timedelta(0),
    code: str | None = None,
    message: str | None = None,
) -> Job:
    """Back into the queue after `delay`, with `attempt` starts counted so far and the failure that led there."""
    queued = job_of(await conn.fetchrow(QUERIES["again"], job.id, delay, attempt, code, message))
    data: dict[str, Any] = {"attempt": attempt}
    if code is not None:
        data |= {"error_code": code, "error_message": message, "retry_seconds": delay.total_seconds()}
    await tell(conn, queued, event, data)
    await conn.execute(QUERIES["notify"], job.kind)
    return queued


async def retry_or_fail(
    conn: asyncpg.Connection, job: Job, code: str, message: str, *, max_attempts: int, backoff: timedelta
) -> None:
    """After a transient failure: queue the next attempt, twice as late each time, or fail and keep the last cause."""
    if job.attempt < max_attempts:
        delay = backoff * 2 ** (job.attempt - 1)
        await again(conn, job, "retrying", attempt=job.attempt, delay=delay, code=code, message=message)
        return
    last = f"gave up after {job.attempt} attempts; the last one: {code}: {message}"
    await fail(conn, job, "ATTEMPTS_EXHAUSTED", last, {"attempts": job.attempt, "cause": code})


async def _end(
    conn: asyncpg.Connection,
    job: Job,
    state: str,
    *,
    result: dict[str, Any] | None = None,
    code: str | None = None,
    message: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> Job:
    ended = job_of(await conn.fetchrow(QUERIES["end"], job.id, state, result or {}, code, message))
    await tell(conn, ended, state, data)
    await conn.execute(QUERIES["notify"], job.kind)
    return ended
