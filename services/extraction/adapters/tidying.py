"""What nobody asks for but keeps a host clean: files of ended extractions, caches nobody reads, the gauge of bytes."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from services.extraction.adapters.caches import PublishedCaches
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.metrics import ExtractionMetrics
from services.extraction.adapters.postgres import QUERIES
from services.kit import errors
from services.kit.database import Database

PERIOD_SECONDS = 600.0


async def tidy(database: Database, caches: PublishedCaches, metrics: ExtractionMetrics) -> None:
    """Once: delete folders of extractions that ended, caches unused for too long, rows without files.

    Raises:
        errors.Unavailable: the database does not answer.
    """
    root = caches.artifacts.root
    async with database.connection() as conn:
        ended = await conn.fetch(QUERIES["ended_of"], WorkFolder.present(root))
    for row in ended:
        await asyncio.to_thread(WorkFolder(root, row["id"]).discard)
    await caches.tidy()
    metrics.cache_bytes.set(await caches.bytes_used())


async def keep_tidy(database: Database, caches: PublishedCaches, metrics: ExtractionMetrics) -> None:
    """Until cancelled."""
    while True:
        with suppress(errors.Unavailable):  # the next round will do
            await tidy(database, caches, metrics)
        await asyncio.sleep(PERIOD_SECONDS)
