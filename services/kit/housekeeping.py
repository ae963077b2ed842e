"""What must be done now and then: forget what is old, and bring files and rows together."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import structlog

from services.kit import audit, errors, events, idempotency
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database
from services.kit.reconcile import GRACE, reconcile

INTERVAL = timedelta(hours=1)

_log = structlog.get_logger(__name__)


async def purge(database: Database) -> dict[str, int]:
    """Delete what is older than its retention: events 7 days, requests 24 hours, audit rows 90 days; returns how many.

    Raises:
        errors.Unavailable: the database does not answer.
    """
    async with database.connection() as conn:
        return {
            "events": await events.purge(conn),
            "requests": await idempotency.purge(conn),
            "audit": await audit.purge(conn),
        }


async def keep_house(database: Database, artifacts: ArtifactStore, *, grace: timedelta = GRACE) -> None:
    """Purge and reconcile at start and every hour, until cancelled. Several processes may: each finds less to do."""
    while True:
        try:
            purged = await purge(database)
            findings = await reconcile(artifacts, database, grace)
            _log.info("house kept", **purged, garbage=len(findings.garbage), lost=len(findings.lost))
            if findings.lost:
                _log.error("artifacts lost", uris=findings.lost)
        except errors.Unavailable:
            _log.warning("house not kept: the database does not answer")
        await asyncio.sleep(INTERVAL.total_seconds())
