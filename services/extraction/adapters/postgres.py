"""Extractions as rows in PostgreSQL; jobs and the memory of requests in the same transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import asyncpg

from services.extraction.domain import (
    EVENT_PREFIX,
    JOB_KIND,
    REUSED_MESSAGE,
    Extraction,
    Filter,
    NewExtraction,
    Options,
    Rates,
)
from services.kit import errors, paging
from services.kit.database import Database, load_queries
from services.kit.events import emit
from services.kit.idempotency import idempotent
from services.kit.ids import new_id
from services.kit.jobs import JobStore
from services.kit.paging import Page
from services.kit.requests import RequestKey

QUERIES = load_queries(__file__)
_COLUMNS = [field.name for field in fields(Extraction)]


class PostgresStore:
    """Implements the port `Store`."""

    def __init__(self, database: Database, jobs: JobStore, *, queue_limit: int) -> None:
        """Use these.

        Args:
            database: where the rows are.
            jobs: the queue.
            queue_limit: extractions that may wait in it.
        """
        self._database = database
        self._jobs = jobs
        self._queue_limit = queue_limit

    def new_id(self) -> str:
        """`ext_act_…`."""
        return new_id("ext_act")

    async def queue(self, new: NewExtraction, key: RequestKey) -> Extraction:
        """Rows of the extraction and of its job in one transaction."""
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                job = await self._jobs.enqueue(
                    conn,
                    kind=JOB_KIND,
                    payload={"extraction_id": new.id, "model_id": new.model_id, "dataset_id": new.dataset_id},
                    created_by=key.caller,
                    resource_id=new.id,
                    event_prefix=EVENT_PREFIX,
                    event_data={"model_id": new.model_id},
                    queue_limit=self._queue_limit,
                )
                await _insert(conn, new, job.id, key.caller)
                request.answer = {"id": new.id}
        return await self.get(request.answer["id"])

    async def reuse(self, new: NewExtraction, cache_id: str, key: RequestKey) -> Extraction:
        """The row and the event that a finished extraction has, without a job."""
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                await _insert(conn, new, None, key.caller)
                await finish_reused(conn, new.id, cache_id)
                row = await conn.fetchrow(QUERIES["get"], new.id)
                facts = {"extraction_id": new.id, "model_id": new.model_id, "status": "completed", "progress": 100.0}
                facts |= {"cache_id": row["cache_id"], "reused": True, "message": REUSED_MESSAGE}
                await emit(conn, f"{EVENT_PREFIX}:completed", new.id, facts)
                request.answer = {"id": new.id}
        return await self.get(request.answer["id"])

    async def get(self, extraction_id: str) -> Extraction:
        """One extraction with what its job tells."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["get"], extraction_id)
        if row is None:
            raise _not_found(extraction_id)
        return _extraction(row)

    async def list(self, wanted: Filter) -> Page:
        """A page, newest first; by offset, or after the row that a token names."""
        filters = (wanted.model_id, wanted.status)
        async with self._database.connection() as conn:
            rows = await conn.fetch(
                QUERIES["list"], *filters, *paging.after(wanted.page_token), wanted.limit + 1, wanted.offset
            )
            total = await conn.fetchval(QUERIES["count"], *filters)
        shown, token = paging.cut(rows, wanted.limit)
        return Page(tuple(_extraction(row) for row in shown), total, wanted.limit, wanted.offset, token)

    async def cancel(self, extraction_id: str) -> None:
        """By its job."""
        async with self._job_of(extraction_id, "cancelled") as (conn, job_id):
            await self._jobs.request_cancel(job_id, conn)

    async def pause(self, extraction_id: str) -> None:
        """By its job."""
        async with self._job_of(extraction_id, "paused") as (conn, job_id):
            await self._jobs.request_pause(job_id, conn)

    async def resume(self, extraction_id: str) -> None:
        """By its job."""
        async with self._job_of(extraction_id, "resumed") as (conn, job_id):
            await self._jobs.resume(job_id, conn)

    @asynccontextmanager
    async def _job_of(self, extraction_id: str, wanted: str) -> AsyncIterator[tuple[asyncpg.Connection, str]]:
        """A transaction and the job; one that a cache answered has none and cannot be what is `wanted`."""
        async with self._database.transaction() as conn:
            job_id = await conn.fetchval(QUERIES["job_of"], extraction_id)
            if job_id is None:
                raise errors.Conflict(
                    f"The extraction is completed and cannot be {wanted}", metadata={"status": "completed"}
                )
            yield conn, job_id

    async def delete(self, extraction_id: str) -> None:
        """The row; files of units are gone with the end of its job."""
        extraction = await self.get(extraction_id)
        if not extraction.ended:
            raise errors.Conflict(
                f"The extraction is {extraction.status}; cancel it first", metadata={"status": extraction.status}
            )
        async with self._database.connection() as conn:
            await conn.execute(QUERIES["delete"], extraction_id)

    async def rates(self, model_id: str, dataset_id: str, options: Options) -> Rates:
        """From the newest row that fits."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(
                QUERIES["rates"], model_id, dataset_id, list(options.hook_points), options.max_length
            )
        return Rates(row["tokens_per_second"], row["tokens_per_sample"], row["overhead_seconds"])


async def finish_reused(conn: asyncpg.Connection, extraction_id: str, cache_id: str) -> None:
    """Complete an extraction with a cache that another one made."""
    cache = await conn.fetchrow("SELECT manifest FROM activation_cache WHERE id = $1", cache_id)
    if cache is None:
        raise errors.Conflict("the cache was deleted meanwhile; ask again", retry_after=1.0)
    manifest = cache["manifest"]
    await conn.execute(
        QUERIES["finish"], extraction_id, cache_id, True, manifest["tokens"], manifest["samples"], 0.0, None, None
    )


async def _insert(conn: asyncpg.Connection, new: NewExtraction, job_id: str | None, caller: str) -> None:
    await conn.execute(
        QUERIES["insert"],
        new.id,
        job_id,
        new.model_id,
        new.dataset_id,
        new.options.as_json(),
        new.key,
        list(new.options.hook_points),
        new.estimate.seconds,
        new.estimate.samples,
        caller,
    )


def _extraction(row: Mapping[str, Any]) -> Extraction:
    values = {name: row[name] for name in _COLUMNS}
    return Extraction(**values | {"activation_shape": row["activation_shape"] or []})


def _not_found(extraction_id: str) -> errors.NotFound:
    return errors.NotFound(f"There is no extraction {extraction_id}", metadata={"id": extraction_id})
