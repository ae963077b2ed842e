"""Numbers of the job table, for /metrics; every process that asks gets the same."""

from __future__ import annotations

import asyncpg

from services.kit.jobs.transitions import QUERIES


async def job_counts(conn: asyncpg.Connection) -> dict[tuple[str, str], int]:
    """How many jobs there are by (kind, state); combinations without any are left out."""
    return {(row["kind"], row["state"]): row["jobs"] for row in await conn.fetch(QUERIES["counts"])}


async def oldest_queued_seconds(conn: asyncpg.Connection) -> dict[str, float]:
    """By kind, how long the oldest queued job exists; 0 where none is queued."""
    return {row["kind"]: row["seconds"] for row in await conn.fetch(QUERIES["oldest_queued"])}


async def attempts(conn: asyncpg.Connection) -> dict[str, int]:
    """By kind, how often jobs were started in all."""
    return {row["kind"]: row["attempts"] for row in await conn.fetch(QUERIES["attempts"])}
