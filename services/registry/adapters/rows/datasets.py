"""The tables `datasets` and `dataset_texts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from services.kit.database import load_queries
from services.kit.errors import NotFound
from services.registry.adapters.rows import columns
from services.registry.dataset_ports import Dataset
from services.registry.listing import Listed, Page

_QUERIES = load_queries(__file__, "datasets.sql")


class PostgresDatasets:
    """Implements DatasetRows on one connection in a transaction."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn

    async def insert(self, row: Mapping[str, Any], texts: Sequence[str]) -> Dataset:
        """Add a dataset, with the texts of an inline one."""
        added = await columns.insert(self._conn, "datasets", row)
        if texts:
            await self._conn.execute(_QUERIES["add_texts"], added["id"], list(texts))
        return columns.build(Dataset, added)

    async def get(self, dataset_id: str) -> Dataset:
        """One dataset."""
        row = await self._conn.fetchrow(_QUERIES["get"], dataset_id)
        if row is None:
            raise NotFound(f"There is no dataset {dataset_id}", metadata={"dataset_id": dataset_id})
        return columns.build(Dataset, row)

    async def page(self, page: Page) -> Listed:
        """Datasets, newest first."""
        rows = await self._conn.fetch(_QUERIES["page"], *(page.after or (None, None)), page.limit + 1, page.offset)
        total = await self._conn.fetchval(_QUERIES["count"])
        return Listed.of([columns.build(Dataset, row) for row in rows], total, page)

    async def delete(self, dataset_id: str) -> None:
        """Remove it."""
        await self._conn.execute(_QUERIES["delete"], dataset_id)

    async def users(self, dataset_id: str) -> list[str]:
        """Unfinished jobs that read it."""
        return [row["id"] for row in await self._conn.fetch(_QUERIES["users"], dataset_id)]

    async def texts(self, dataset_id: str, after: int, limit: int) -> list[str]:
        """Texts from a position."""
        return [row["text"] for row in await self._conn.fetch(_QUERIES["texts"], dataset_id, after, limit)]
