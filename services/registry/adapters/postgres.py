"""The registry's rows in PostgreSQL: one transaction, with events and jobs written inside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from services.kit import events, idempotency
from services.kit.database import Database
from services.kit.errors import LensmeshError
from services.kit.jobs import JobStore
from services.kit.requests import RequestKey
from services.registry.adapters.rows import columns
from services.registry.adapters.rows.datasets import PostgresDatasets
from services.registry.adapters.rows.groups import PostgresGroups
from services.registry.adapters.rows.habits import PostgresHabits
from services.registry.adapters.rows.models import PostgresModels
from services.registry.adapters.rows.placement import PostgresPlacement
from services.registry.domain import Model
from services.registry.failures import load_failure
from services.registry.figures import Counted
from services.registry.ports import Answered, Turn

LOAD_KIND = "model_load"
PRELOAD_KIND = "group_preload"
SWITCH_KIND = "group_switch"

_WAITING_OF_USER = "SELECT count(*) FROM jobs WHERE kind = $1 AND state = 'queued' AND created_by = $2"
_TURNS = """
SELECT id, payload, row_number() OVER (ORDER BY state = 'queued', priority DESC, run_at, created_at, id) AS position
FROM jobs WHERE kind = $1 AND lane = $2 AND state IN ('queued', 'running', 'finalizing') ORDER BY position
"""


class PostgresTransaction:
    """Implements Transaction on one connection that is in a transaction."""

    def __init__(self, conn: asyncpg.Connection, jobs: JobStore) -> None:
        self.models = PostgresModels(conn)
        self.placement = PostgresPlacement(conn)
        self.groups = PostgresGroups(conn)
        self.datasets = PostgresDatasets(conn)
        self.habits = PostgresHabits(conn)
        self._conn = conn
        self._jobs = jobs

    async def emit(self, event: str, resource_id: str, data: Mapping[str, Any]) -> None:
        """Write an event."""
        await events.emit(self._conn, event, resource_id, data)

    async def emit_all(self, told: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Write events."""
        await events.emit_all(self._conn, told)

    async def enqueue_load(self, job_id: str, model: Model, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that loads a model; its own events are `load:…` of the job."""
        await self._enqueue(LOAD_KIND, "load", job_id, payload, subject, about={"model_id": model.id})

    async def enqueue_preload(self, job_id: str, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that preloads a group; its own events are `preload:…` of the job."""
        await self._enqueue(PRELOAD_KIND, "preload", job_id, payload, subject, about={"group_id": payload["group_id"]})

    async def enqueue_switch(self, job_id: str, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that switches to another group; a user's second waits behind every other user's first."""
        mine = await self._conn.fetchval(_WAITING_OF_USER, SWITCH_KIND, subject)
        about, lane = {"group_id": payload["group_id"]}, payload["host_id"]
        await self._enqueue(SWITCH_KIND, "switch", job_id, payload, subject, about=about, priority=-mine, lane=lane)

    async def switch_turns(self, host_id: str) -> list[Turn]:
        """Switches of a host that run or wait, the next one first."""
        rows = await self._conn.fetch(_TURNS, SWITCH_KIND, host_id)
        return [Turn(row["id"], row["payload"]["group_id"], row["payload"]["lens_id"], row["position"]) for row in rows]

    async def _enqueue(
        self,
        kind: str,
        event_prefix: str,
        job_id: str,
        payload: Mapping[str, Any],
        subject: str,
        *,
        about: dict[str, Any],
        priority: int = 0,
        lane: str | None = None,
    ) -> None:
        await self._jobs.enqueue(
            self._conn,
            kind=kind,
            payload=dict(payload),
            created_by=subject,
            event_prefix=event_prefix,
            event_data=about,
            job_id=job_id,
            priority=priority,
            lane=lane,
        )

    async def job_outcome(self, job_id: str) -> tuple[str, LensmeshError]:
        """A job's state, and why it ended so; one that is gone counts as failed."""
        row = await self._conn.fetchrow("SELECT state, error_code, error_message FROM jobs WHERE id = $1", job_id)
        if row is None:
            return "failed", load_failure("INTERNAL", "The load's job is gone")
        if row["state"] == "cancelled":
            return "cancelled", load_failure("CANCELLED", "The load was cancelled")
        return row["state"], load_failure(row["error_code"] or "INTERNAL", row["error_message"] or "")

    @asynccontextmanager
    async def once(self, request: RequestKey) -> AsyncIterator[Answered]:
        """Do the block once per request id."""
        async with idempotency.idempotent(self._conn, request) as answered:
            yield answered

    async def counted(self) -> Counted:
        """Figures for metrics."""
        return columns.build(Counted, await self.models.counted())


class PostgresStore:
    """Implements Store."""

    def __init__(self, database: Database, jobs: JobStore) -> None:
        self._database = database
        self._jobs = jobs

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresTransaction]:
        """All of it or nothing."""
        async with self._database.transaction() as conn:
            yield PostgresTransaction(conn, self._jobs)
