"""The table `habits`: a Markov chain of what users switch to."""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg

from services.kit.database import load_queries
from services.registry.habits import Place

_QUERIES = load_queries(__file__, "habits.sql")


class PostgresHabits:
    """Implements HabitRows on one connection in a transaction."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn

    async def keep(self, steps: Mapping[tuple[str, Place, Place], int]) -> None:
        """Count steps of users."""
        rows = [
            (subject, before.group_id, before.lens_id, after.group_id, after.lens_id, times)
            for (subject, before, after), times in steps.items()
        ]
        await self._conn.execute(_QUERIES["keep"], *map(list, zip(*rows, strict=True)))

    async def likely(self, subject: str, here: Place) -> Place | None:
        """Where a user is likely to go next."""
        row = await self._conn.fetchrow(_QUERIES["likely"], subject, here.group_id, here.lens_id)
        return None if row is None else Place(*row)

    async def preloading(self, group_id: str) -> bool:
        """Whether a preload of a group is under way."""
        return await self._conn.fetchval(_QUERIES["preloading"], group_id)
