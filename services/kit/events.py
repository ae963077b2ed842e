"""Events: written in the transaction of the change they tell of, with a contiguous sequence per topic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from services.kit import errors
from services.kit.database import Database, load_queries

CHANNEL = "lensmesh_events"
"""PostgreSQL notification channel; the payload is `<topic> <sequence>`."""
RETENTION = timedelta(days=7)

_QUERIES = load_queries(__file__, "events.sql")
_NAME = re.compile(r"([a-z][a-z0-9_]*):([a-z][a-z0-9_]*)")


@dataclass(frozen=True, slots=True)
class Event:
    """One committed event."""

    event: str
    """Name, `<prefix>:<what>`, for example `model:loading`."""
    resource_id: str
    """Id of the resource it tells of."""
    sequence: int
    """Position within its topic: 1, 2, 3, … without a gap."""
    created_at: datetime
    """When it was written, by the database's clock."""
    data: dict[str, Any]
    """Facts for clients, `sequence` and `timestamp` among them."""
    position: int
    """Row number in the whole mesh's log; grows, but not without gaps and not exactly in commit order."""

    @property
    def topic(self) -> str:
        """`<prefix>:<resource id>`, what watchers subscribe to."""
        return topic_of(self.event, self.resource_id)


def topic_of(event: str, resource_id: str) -> str:
    """The topic of an event name, or of a bare prefix, and a resource."""
    return f"{event.partition(':')[0]}:{resource_id}"


async def emit(conn: asyncpg.Connection, event: str, resource_id: str, data: Mapping[str, Any]) -> int:
    """Write one event; see `emit_all`. Returns its sequence within its topic."""
    return (await emit_all(conn, [(event, resource_id, data)]))[0]


async def emit_all(conn: asyncpg.Connection, told: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
    """Write events in the caller's transaction: they exist exactly if that transaction commits.

    The topics' rows stay locked until then, so a transaction that emits for several resources one after another goes
    through them in the order of their ids, as every other does, or two of them may deadlock.

    Args:
        conn: connection in a transaction.
        told: of each event its name, `<prefix>:<what>`, the resource it tells of, and plain JSON, to which `sequence`
            and `timestamp` (ISO 8601, UTC) are added.

    Returns:
        The events' sequences within their topics.
    """
    assert conn.is_in_transaction(), "an event belongs to the transaction of its change"
    rows = []
    for event, resource_id, data in told:
        name = _NAME.fullmatch(event)
        assert name is not None, f"{event!r} is not <prefix>:<what>"
        rows.append((topic_of(event, resource_id), name[1], event, resource_id, dict(data)))
    found = await conn.fetch(_QUERIES["emit"], *map(list, zip(*rows, strict=True)))
    return [row["sequence"] for row in found]


class EventLog:
    """Reads committed events; the truth that every other way of delivery is measured against."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def heads(self, topics: Iterable[str]) -> dict[str, int]:
        """The last sequence of each topic that exists; `model:*` stands for all topics of a prefix."""
        exact, prefixes = split_topics(topics)
        async with self._database.connection() as conn:
            return {row["topic"]: row["last_sequence"] for row in await conn.fetch(_QUERIES["heads"], exact, prefixes)}

    async def after(self, topics: Iterable[str], cursors: Mapping[str, int], limit: int = 500) -> list[Event]:
        """Up to `limit` events beyond `cursors` (topic to the sequence seen last, default 0), each topic in order."""
        exact, prefixes = split_topics(topics)
        async with self._database.connection() as conn:
            rows = await conn.fetch(_QUERIES["after"], exact, prefixes, dict(cursors), limit)
        return [event_of(row) for row in rows]


async def outbox(conn: asyncpg.Connection, limit: int) -> list[Event]:
    """The oldest events that were not relayed yet."""
    return [event_of(row) for row in await conn.fetch(_QUERIES["outbox"], limit)]


async def mark_relayed(conn: asyncpg.Connection, positions: Iterable[int]) -> None:
    """Take events out of the outbox."""
    await conn.execute(_QUERIES["mark_relayed"], list(positions))


async def outbox_depth(conn: asyncpg.Connection) -> tuple[int, float]:
    """How many events wait for the relay, and the age of the oldest in seconds (0 when none)."""
    row = await conn.fetchrow(_QUERIES["outbox_depth"])
    return row["depth"], row["lag_seconds"]


async def purge(conn: asyncpg.Connection, retention: timedelta = RETENTION) -> int:
    """Delete events older than `retention`, relayed or not, except each topic's last; returns how many."""
    return int((await conn.execute(_QUERIES["purge"], retention)).split()[-1])


def split_topics(topics: Iterable[str]) -> tuple[list[str], list[str]]:
    """Exact topics, and the prefixes of those that end in `:*`.

    Raises:
        errors.Invalid: a topic without a colon.
    """
    exact, prefixes = [], []
    for topic in topics:
        prefix, colon, resource = topic.partition(":")
        if not (prefix and colon and resource):
            raise errors.Invalid.of("topics", f"{topic!r} is not <prefix>:<id> or <prefix>:*")
        if resource == "*":
            prefixes.append(prefix)
        else:
            exact.append(topic)
    return exact, prefixes


def event_of(row: asyncpg.Record) -> Event:
    """The event of a row with the columns of the table `events`."""
    return Event(row["event"], row["resource_id"], row["sequence"], row["created_at"], row["data"], row["id"])
