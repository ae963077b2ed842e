"""The tables `models` and `loads`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg

from services.kit.database import load_queries
from services.registry.adapters.rows import columns
from services.registry.domain import Load, Model
from services.registry.failures import model_not_found
from services.registry.listing import Listed, Page

_QUERIES = load_queries(__file__, "models.sql")


class PostgresModels:
    """Implements ModelRows on one connection in a transaction."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn

    async def insert(self, row: Mapping[str, Any]) -> Model:
        """Add a model."""
        return columns.build(Model, await columns.insert(self._conn, "models", row))

    async def get(self, model_id: str, *, lock: bool = False) -> Model:
        """One model; the lock is taken before the row is read, so that what is read is current."""
        if lock:
            await self._conn.fetchval(_QUERIES["lock"], model_id)
        row = await self._conn.fetchrow(_QUERIES["get"], model_id)
        if row is None:
            raise model_not_found(model_id)
        return _model(row)

    async def page(self, page: Page, *, status: str | None, model_type: str | None) -> Listed:
        """Models, newest first."""
        after = page.after or (None, None)
        rows = await self._conn.fetch(_QUERIES["page"], status, model_type, *after, page.limit + 1, page.offset)
        total = await self._conn.fetchval(_QUERIES["count"], status, model_type)
        return Listed.of([_model(row) for row in rows], total, page)

    async def update(self, model_id: str, **values: Any) -> Model:
        """Set columns."""
        await columns.update(self._conn, "models", {"id": model_id}, values)
        await self._conn.execute("UPDATE models SET updated_at = now() WHERE id = $1", model_id)
        return await self.get(model_id)

    async def append_perplexity(self, model_id: str, result: Mapping[str, Any]) -> None:
        """Keep a measurement."""
        await self._conn.execute(_QUERIES["append_perplexity"], model_id, dict(result))

    async def unquantized_perplexity(self, digest: str, dataset_id: str, tokens: int) -> float | None:
        """The last one measured with these files on the same tokens."""
        return await self._conn.fetchval(_QUERIES["unquantized_perplexity"], digest, dataset_id, tokens)

    async def to_restore(self) -> list[str]:
        """Ids of models that are wanted and nowhere."""
        return [row["id"] for row in await self._conn.fetch(_QUERIES["to_restore"])]

    async def want_preloaded(self, silence_seconds: float) -> None:
        """Set what is wanted when the whole mesh starts."""
        await self._conn.execute(_QUERIES["want_preloaded"], silence_seconds)

    async def delete(self, model_id: str) -> None:
        """Remove the row."""
        await self._conn.execute(_QUERIES["delete"], model_id)

    async def sharers(self, model_id: str) -> int:
        """How many other models have the same files."""
        return await self._conn.fetchval(_QUERIES["sharers"], model_id)

    async def users(self, model_id: str) -> list[str]:
        """Groups, lenses and unfinished jobs that use it."""
        return [row["name"] for row in await self._conn.fetch(_QUERIES["users"], model_id)]

    async def measured(self, model_id: str, quantization: str) -> tuple[int | None, float | None]:
        """Bytes and seconds of its last good load."""
        row = await self._conn.fetchrow(_QUERIES["measured"], model_id, quantization)
        return (None, None) if row is None else (row["memory_bytes"], row["seconds"])

    async def load_speed(self) -> float | None:
        """Bytes per second over the latest good loads."""
        return await self._conn.fetchval(_QUERIES["load_speed"])

    async def loads_within_hour(self, subject: str) -> tuple[int, float]:
        """Loads of a user, counted under a lock, so that two at once cannot both be the last one allowed."""
        await self._conn.execute(_QUERIES["lock_user"], subject)
        row = await self._conn.fetchrow(_QUERIES["loads_within_hour"], subject)
        return row["loads"], row["seconds"]

    async def start_load(self, load_id: str, **values: Any) -> None:
        """Write down a load that was accepted."""
        await columns.put(self._conn, "loads", ["id"], {"id": load_id, "outcome": "running", **values})

    async def end_load(
        self,
        load_id: str,
        outcome: str,
        *,
        memory_bytes: int | None = None,
        seconds: float | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Write down how it ended."""
        values = {
            "outcome": outcome,
            "memory_bytes": memory_bytes,
            "seconds": seconds,
            "error_code": error_code,
            "error_message": error_message,
        }
        await columns.update(self._conn, "loads", {"id": load_id}, values)

    async def find_load(self, load_id: str) -> Load | None:
        """A load that was accepted."""
        row = await self._conn.fetchrow("SELECT * FROM loads WHERE id = $1", load_id)
        return None if row is None else columns.build(Load, row)

    async def abandoned_loads(self) -> list[str]:
        """Loads that count as running although their jobs have ended."""
        return [row["id"] for row in await self._conn.fetch(_QUERIES["abandoned_loads"])]

    async def counted(self) -> asyncpg.Record:
        """Figures for metrics."""
        return await self._conn.fetchrow(_QUERIES["counted"])


def _model(row: asyncpg.Record) -> Model:
    """A row of models_placed; while it is resident, its last use is what its hosts tell."""
    used = [at for at in (row["last_used_at"], row["used_at"]) if at is not None]
    return columns.build(Model, {**row, "last_used_at": max(used, default=None)})
