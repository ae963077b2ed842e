"""The tables `groups`, `lenses`, `lens_residencies` and `switches`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from services.kit.database import load_queries
from services.kit.errors import NotFound
from services.registry.adapters.rows import columns
from services.registry.domain import Group, Lens
from services.registry.listing import Listed, Page

_QUERIES = load_queries(__file__, "groups.sql")


class PostgresGroups:
    """Implements GroupRows on one connection in a transaction."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn

    async def insert(self, row: Mapping[str, Any]) -> Group:
        """Add a group."""
        return columns.build(Group, await columns.insert(self._conn, "groups", row))

    async def get(self, group_id: str, *, lock: bool = False) -> Group:
        """One group with its lenses; the lock is taken before the row is read."""
        if lock:
            await self._conn.fetchval(_QUERIES["lock"], group_id)
        row = await self._conn.fetchrow(_QUERIES["get"], group_id)
        if row is None:
            raise NotFound(f"There is no group {group_id}", metadata={"group_id": group_id})
        return (await self._filled([row]))[0]

    async def page(self, page: Page, *, model_id: str | None) -> Listed:
        """Groups, newest first."""
        rows = await self._conn.fetch(
            _QUERIES["page"], model_id, *(page.after or (None, None)), page.limit + 1, page.offset
        )
        return Listed.of(await self._filled(rows), await self._conn.fetchval(_QUERIES["count"], model_id), page)

    async def delete(self, group_id: str) -> None:
        """Remove a group and its lenses."""
        await self._conn.execute(_QUERIES["delete"], group_id)

    async def lock_of_model(self, model_id: str) -> None:
        """Lock the groups of a base."""
        await self._conn.fetch(_QUERIES["lock_of_model"], model_id)

    async def of_model(self, model_id: str) -> list[Group]:
        """Groups of a base."""
        return await self._filled(await self._conn.fetch(_QUERIES["of_model"], model_id))

    async def add_lens(self, row: Mapping[str, Any]) -> Lens:
        """Add a lens."""
        return columns.build(Lens, await columns.insert(self._conn, "lenses", row))

    async def lens_failed(self, lens_id: str, code: str | None, message: str | None) -> None:
        """Why it could not be attached."""
        await self._conn.execute(_QUERIES["lens_failed"], lens_id, code, message)

    async def retarget_lens(self, lens_id: str, artifact_uri: str) -> None:
        """Other files."""
        await self._conn.execute(_QUERIES["retarget_lens"], lens_id, artifact_uri)

    async def remove_lens(self, lens_id: str) -> None:
        """Forget a lens."""
        await self._conn.execute(_QUERIES["remove_lens"], lens_id)

    async def place_lens(self, lens_id: str, model_id: str, host_id: str, size: int, state: str = "here") -> None:
        """A lens is on a device, or coming."""
        row = {"lens_id": lens_id, "model_id": model_id, "host_id": host_id, "charge_bytes": size, "state": state}
        await columns.put(self._conn, "lens_residencies", ["lens_id", "host_id"], row)

    async def charge_lens(self, lens_id: str, host_id: str, size: int, most: int) -> None:
        """More bytes of a lens that is about to be there."""
        await self._conn.execute(_QUERIES["charge_lens"], lens_id, host_id, size, most)

    async def displace_lens(self, lens_id: str, host_id: str) -> None:
        """A lens is off a device."""
        await self._conn.execute(_QUERIES["displace_lens"], lens_id, host_id)

    async def lens_parked(self, lens_id: str, host_id: str) -> None:
        """A lens is in host memory alone."""
        await self._conn.execute(_QUERIES["lens_parked"], lens_id, host_id)

    async def exclusive(self, model_id: str) -> bool:
        """Whether a group of a base wants the device alone."""
        return await self._conn.fetchval(_QUERIES["exclusive"], model_id)

    async def begin_turn(self, model_id: str, lens_ids: Sequence[str]) -> dict[str, set[str]]:
        """Lock the groups of a base; which of the lenses each of them has."""
        rows = await self._conn.fetch(_QUERIES["begin_turn"], model_id, lens_ids)
        return {row["id"]: set(row["lens_ids"]) for row in rows}

    async def end_turn(self, model_id: str, done: Sequence[tuple[str, str | None, str, float]]) -> None:
        """Switches happened one after another."""
        await self._conn.execute(_QUERIES["end_turn"], model_id, *map(list, zip(*done, strict=True)))

    async def activate_extension(self, model_id: str, extension_id: str | None) -> None:
        """An extension was activated on its base."""
        await self._conn.execute(_QUERIES["activate_extension"], model_id, extension_id)

    async def record_switch(self, group_id: str, kind: str, seconds: float) -> None:
        """Keep a measurement."""
        await self._conn.execute(_QUERIES["record_switch"], group_id, kind, seconds)

    async def switch_seconds(self, group_id: str, kind: str) -> float | None:
        """Mean of the last switches of a kind."""
        return await self._conn.fetchval(_QUERIES["switch_seconds"], group_id, kind)

    async def _filled(self, rows: Sequence[asyncpg.Record]) -> list[Group]:
        lenses: dict[str, list[Lens]] = defaultdict(list)
        for row in await self._conn.fetch(_QUERIES["lenses"], [row["id"] for row in rows]):
            lenses[row["group_id"]].append(columns.build(Lens, row))
        return [columns.build(Group, row, lenses=tuple(lenses[row["id"]])) for row in rows]
