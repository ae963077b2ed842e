"""Activation caches: rows in PostgreSQL, files in the artifact store, the least recently used ones make room."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg

from services.extraction.domain import ARTIFACT_KIND, Cache, Filter
from services.kit import errors, paging
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database, load_queries
from services.kit.ids import new_id
from services.kit.paging import Page

QUERIES = load_queries(__file__, "caches.sql")


@dataclass(frozen=True, slots=True)
class NewCache:
    """A cache's row before it has an id."""

    model_id: str
    dataset_id: str
    layers: list[int]
    samples: int
    seconds: float
    shape: list[int]
    key: str
    hook_points: list[str]
    manifest: dict[str, Any]


class PublishedCaches:
    """Implements the port `Caches`."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        *,
        limit_bytes: int,
        reuse_for: timedelta,
        unused_for: timedelta,
    ) -> None:
        """Use these.

        Args:
            database: where the rows are.
            artifacts: where this host's files are.
            limit_bytes: most bytes of caches on this host.
            reuse_for: how old a cache may be to answer a request.
            unused_for: how long a cache stays without a reader.
        """
        self.limit_bytes = limit_bytes
        self.artifacts = artifacts
        self._database = database
        self._reuse_for = reuse_for
        self._unused_for = unused_for

    async def find(self, key: str, hook_points: Collection[str]) -> Cache | None:
        """By content key; its files are on this host."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["find"], key, list(hook_points), self._reuse_for)
        if row is None or not self.artifacts.location(row["storage_uri"]).is_dir():
            return None
        return _cache(row)

    async def get(self, cache_id: str) -> Cache:
        """One cache."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["get"], cache_id)
        if row is None:
            raise errors.NotFound(f"There is no activation cache {cache_id}", metadata={"id": cache_id})
        return _cache(row)

    async def list(self, wanted: Filter) -> Page:
        """A page, newest first; by offset, or after the row that a token names."""
        async with self._database.connection() as conn:
            rows = await conn.fetch(
                QUERIES["list"], wanted.model_id, *paging.after(wanted.page_token), wanted.limit + 1, wanted.offset
            )
            total = await conn.fetchval(QUERIES["count"], wanted.model_id)
        shown, token = paging.cut(rows, wanted.limit)
        return Page(tuple(_cache(row) for row in shown), total, wanted.limit, wanted.offset, token)

    async def delete(self, cache_id: str) -> None:
        """Files first, under the store's guard against readers; then the row."""
        cache = await self.get(cache_id)
        with suppress(errors.NotFound):  # on another host, or lost: nothing of it is here
            await self.artifacts.delete(self._database, cache.storage_uri)
        async with self._database.connection() as conn:
            await conn.execute(QUERIES["delete"], cache_id)

    async def touch(self, cache_id: str) -> None:
        """Its place in the order of use."""
        async with self._database.connection() as conn:
            await conn.execute(QUERIES["touch"], cache_id)

    @asynccontextmanager
    async def reading(self, cache: Cache) -> AsyncIterator[Path]:
        """The directory under a lease."""
        async with self.artifacts.reading(self._database, cache.storage_uri) as directory:
            yield directory

    async def insert(self, conn: asyncpg.Connection, new: NewCache, uri: str, size_bytes: int) -> str:
        """The row of files that were just published, in the same transaction; the cache's id."""
        return await conn.fetchval(
            QUERIES["insert"],
            new_id("act_cache"),
            new.model_id,
            new.dataset_id,
            new.layers,
            new.samples,
            uri,
            size_bytes,
            new.seconds,
            new.shape,
            new.key,
            new.hook_points,
            new.manifest,
        )

    async def make_room(self, size_bytes: int) -> None:
        """Delete the least recently used caches until `size_bytes` more fit the limit and the disk; never a read one.

        Raises:
            errors.Exhausted: `CACHE_FULL`: it cannot be; what would not have helped was not deleted.
        """
        async with self._database.connection() as conn:
            caches = await conn.fetch(QUERIES["here"], self.artifacts.store_id)
            used = (await self.artifacts.bytes_by_kind(conn)).get(ARTIFACT_KIND, 0)
        free = min(self.limit_bytes - used, shutil.disk_usage(self.artifacts.root).free)
        if size_bytes > free + sum(row["size_bytes"] for row in caches):
            raise _full(size_bytes, free)
        for row in caches:
            if size_bytes <= free:
                return
            with suppress(errors.Conflict):  # somebody reads it
                await self.delete(row["id"])
                free += row["size_bytes"]
        if size_bytes > free:
            raise _full(size_bytes, free)

    async def bytes_used(self) -> int:
        """Bytes of the caches on this host."""
        async with self._database.connection() as conn:
            return (await self.artifacts.bytes_by_kind(conn)).get(ARTIFACT_KIND, 0)

    async def tidy(self) -> None:
        """Delete caches that nobody has read for long, and rows whose files are gone from every host."""
        async with self._database.connection() as conn:
            await conn.execute(QUERIES["orphans"])
            unused = await conn.fetch(QUERIES["unused"], self.artifacts.store_id, self._unused_for)
        for row in unused:
            with suppress(errors.Conflict, errors.NotFound):
                await self.delete(row["id"])


def _full(required: int, available: int) -> errors.Exhausted:
    return errors.Exhausted(
        f"the cache needs {required / 1e9:.3f} GB, {max(available, 0) / 1e9:.3f} GB are free",
        reason="CACHE_FULL",
        metadata={"required_bytes": required, "available_bytes": max(available, 0)},
    )


def _cache(row: Mapping[str, Any]) -> Cache:
    return Cache(
        id=row["id"],
        model_id=row["model_id"],
        dataset_id=row["dataset_id"],
        storage_uri=row["storage_uri"],
        size_bytes=row["file_size_bytes"],
        manifest=row["manifest"],
        created_at=row["created_at"],
        last_accessed_at=row["last_accessed_at"],
    )
