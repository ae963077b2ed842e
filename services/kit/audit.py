"""The audit log: who changed what, when, and how it ended."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import asyncpg

from services.kit.database import Database, load_queries
from services.kit.trace import current_trace

RETENTION = timedelta(days=90)

_QUERIES = load_queries(__file__, "audit.sql")


class Subject(Protocol):
    """Whoever made the call."""

    @property
    def subject(self) -> str:
        """The name it is known by."""


async def record(database: Database, caller: Subject, method: str, resource: str, outcome: str) -> None:
    """Write one row, with the current trace, in a transaction of its own: a call that failed is logged too.

    Args:
        database: where the log is.
        caller: who called.
        method: full name of the rpc.
        resource: id of what it is about; empty when there is none yet.
        outcome: `OK` or the error's reason.

    Raises:
        errors.Unavailable: the database does not answer.
    """
    async with database.connection() as conn:
        await conn.execute(_QUERIES["record"], caller.subject, method, resource, outcome, current_trace())


async def purge(conn: asyncpg.Connection, retention: timedelta = RETENTION) -> int:
    """Delete rows older than `retention`; returns how many."""
    return int((await conn.execute(_QUERIES["purge"], retention)).split()[-1])
