"""The audit log: who changed what, when, and how it ended."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import asyncpg

from services.kit.database import Database, load_queries
from services.kit.gathering import Gathering
from services.kit.trace import current_trace

RETENTION = timedelta(days=90)

_QUERIES = load_queries(__file__, "audit.sql")


class Subject(Protocol):
    """Whoever made the call."""

    @property
    def subject(self) -> str:
        """The name it is known by."""


class AuditLog:
    """Writes rows in transactions of their own: a call that failed is logged too."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows = Gathering(self._write)

    async def record(self, caller: Subject, method: str, resource: str, outcome: str) -> None:
        """Write one row, with the current trace; it is there when this returns.

        Args:
            caller: who called.
            method: full name of the rpc.
            resource: id of what it is about; empty when there is none yet.
            outcome: `OK` or the error's reason.

        Raises:
            errors.Unavailable: the database does not answer.
        """
        await self._rows.ask((caller.subject, method, resource, outcome, current_trace()))

    async def _write(self, rows: list[tuple[str, str, str, str, str]]) -> list[None]:
        async with self._database.connection() as conn:
            await conn.execute(_QUERIES["record"], *map(list, zip(*rows, strict=True)))
        return [None] * len(rows)


async def purge(conn: asyncpg.Connection, retention: timedelta = RETENTION) -> int:
    """Delete rows older than `retention`; returns how many."""
    return int((await conn.execute(_QUERIES["purge"], retention)).split()[-1])
