"""What every process tidies once an hour: rows past their retention, and files that crashes left without a row."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from services.kit import audit, errors, events, idempotency
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database
from services.kit.logs import get_logger
from services.kit.reconcile import reconcile

INTERVAL_SECONDS = 3600.0


async def tidy(database: Database, artifacts: ArtifactStore) -> None:
    """Once: purge events, requests and audit rows, and reconcile this host's artifacts.

    Raises:
        errors.Unavailable: the database does not answer; what was done so far holds.
    """
    async with database.transaction() as conn:
        purged = {
            module.__name__.rpartition(".")[2]: await module.purge(conn) for module in (events, idempotency, audit)
        }
    findings = {name: uris for name, uris in asdict(await reconcile(artifacts, database)).items() if uris}
    if findings or any(purged.values()):
        get_logger("housekeeping").info("tidied", purged=purged, **findings)


async def keep_house(database: Database, artifacts: ArtifactStore) -> None:
    """Until cancelled, tidy at the start and then every hour; several processes may do it side by side."""
    while True:
        try:
            await tidy(database, artifacts)
        except errors.LensmeshError as error:
            get_logger("housekeeping").warning("not tidied", reason=error.reason, error=error.message)
        await asyncio.sleep(INTERVAL_SECONDS)
