"""Extensions, their files and their trainings: rows in PostgreSQL, artifacts in the store, one transaction for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import asyncpg

from services.extensions.domain import (
    ARTIFACT_KIND,
    JOB_KIND,
    MERGE_KIND,
    Extension,
    Filter,
    Layer,
    Lora,
    NewTraining,
    Sharer,
    Training,
)
from services.kit import errors, paging
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database, load_queries
from services.kit.idempotency import idempotent
from services.kit.ids import new_id
from services.kit.jobs import Job, JobStore
from services.kit.paging import Page
from services.kit.requests import RequestKey

QUERIES = load_queries(__file__)
EVENT_PREFIX = "extension"
_ACTIVE = frozenset({"queued", "running", "paused", "finalizing"})
_COLUMNS = {field.name for field in fields(Extension)} - {"lora", "layers", "active"}


class PostgresStore:
    """Implements the port `Store`."""

    def __init__(self, database: Database, jobs: JobStore, artifacts: ArtifactStore) -> None:
        self._database = database
        self._jobs = jobs
        self.artifacts = artifacts

    def new_id(self) -> str:
        """`x_…`."""
        return new_id("x")

    async def insert(self, extension: Extension, write: Callable[[Path], None], key: RequestKey) -> Extension:
        """Publish the files and write the rows, or answer with what the same request made before."""
        with self.artifacts.staging(ARTIFACT_KIND) as folder:
            await asyncio.to_thread(write, folder)
            async with self._database.transaction() as conn, idempotent(conn, key) as request:
                if request.answer is None:
                    artifact = await self.artifacts.publish(
                        conn, ARTIFACT_KIND, folder, {"task_name": extension.task_name}
                    )
                    await conn.execute(
                        QUERIES["insert"],
                        extension.id,
                        extension.model_id,
                        extension.task_name,
                        extension.kind,
                        asdict(extension.lora) if extension.lora else None,
                        [asdict(layer) for layer in extension.layers],
                        dict(extension.parameter_counts),
                        extension.base_digest,
                        extension.created_by,
                        extension.freeze_base,
                        extension.shared_layer_of,
                        extension.train_shared_layer,
                    )
                    version = (extension.id, 1, artifact.uri, artifact.digest, artifact.size_bytes)
                    await conn.execute(QUERIES["insert_version"], *version)
                    request.answer = {"id": extension.id}
        return await self.get(request.answer["id"])

    async def get(self, extension_id: str) -> Extension:
        """One extension with its newest version."""
        async with self._database.connection() as conn:
            return await _get(conn, extension_id)

    async def list(self, wanted: Filter) -> Page:
        """A page, newest first; by offset, or after the row that a token names."""
        async with self._database.connection() as conn:
            filters = (wanted.model_id, wanted.task_name)
            rows = await conn.fetch(
                QUERIES["list"], *filters, *paging.after(wanted.page_token), wanted.limit + 1, wanted.offset
            )
            total = await conn.fetchval(QUERIES["count"], *filters)
        shown, token = paging.cut(rows, wanted.limit)
        return Page(tuple(_extension(row) for row in shown), total, wanted.limit, wanted.offset, token)

    async def delete(self, extension_id: str) -> None:
        """Rows first, then the files that no other extension shares."""
        async with self._database.transaction() as conn:
            await lock(conn, extension_id)
            await _require_idle(conn, extension_id)
            uris = [row["artifact_uri"] for row in await conn.fetch(QUERIES["artifacts_of"], extension_id)]
            await conn.execute(QUERIES["delete"], extension_id)
        await self.discard(uris)

    async def enqueue(self, training: NewTraining, key: RequestKey) -> str:
        """Queue the job and note which version it trains."""
        extension_id = training.extension_id
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                await lock(conn, extension_id)
                await _require_idle(conn, extension_id)
                if (other := await conn.fetchval(QUERIES["training_of_family"], extension_id)) is not None:
                    raise errors.Conflict(
                        f"an extension with the same layers is being trained by {other}", metadata={"job_id": other}
                    )
                job = await self._jobs.enqueue(
                    conn,
                    kind=JOB_KIND,
                    payload=asdict(training),
                    created_by=key.caller,
                    resource_id=extension_id,
                    event_prefix=EVENT_PREFIX,
                )
                await conn.execute(QUERIES["insert_training"], extension_id, job.id)
                await conn.execute(QUERIES["set_job"], extension_id, job.id)
                request.answer = {"job_id": job.id}
        return request.answer["job_id"]

    async def sharers(self, extension: Extension) -> Sequence[Sharer]:
        """Of the same first owner."""
        async with self._database.connection() as conn:
            rows = await conn.fetch(QUERIES["sharers"], extension.id)
            return [
                Sharer(await _get(conn, row["id"]), NewTraining(**row["payload"]) if row["payload"] else None)
                for row in rows
            ]

    async def enqueue_merge(self, extension_id: str, name: str, key: RequestKey) -> str:
        """Queue the job."""
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                await lock(conn, extension_id)
                await _require_idle(conn, extension_id)
                job = await self._jobs.enqueue(
                    conn,
                    kind=MERGE_KIND,
                    payload={"name": name},
                    created_by=key.caller,
                    resource_id=extension_id,
                    event_prefix=EVENT_PREFIX,
                )
                request.answer = {"job_id": job.id}
        return request.answer["job_id"]

    @asynccontextmanager
    async def reading(self, artifact_uri: str) -> AsyncIterator[Path]:
        """The files under a lease."""
        async with self.artifacts.reading(self._database, artifact_uri) as folder:
            yield folder

    async def training(self, job: Job) -> Training:
        """What a claimed job is to do."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["training"], job.id)
            if row is None:
                raise _not_found(job.resource_id)
            extension = await _get(conn, job.resource_id)
        return Training(
            wanted=NewTraining(**job.payload),
            extension=extension,
            result=row["result"],
            artifact_uri=row["artifact_uri"],
            checkpoint_uri=row["checkpoint_uri"],
            loss_before=row["loss_before"],
        )

    async def discard(self, uris: Iterable[str]) -> None:
        """Delete the artifacts that no row refers to."""
        async with self._database.connection() as conn:
            unused = [row["uri"] for row in await conn.fetch(QUERIES["unused"], list(uris))]
        for uri in unused:
            with suppress(
                errors.NotFound, errors.Conflict
            ):  # elsewhere, or still read: the store's rows say what is left
                await self.artifacts.delete(self._database, uri)


async def _get(conn: asyncpg.Connection, extension_id: str) -> Extension:
    row = await conn.fetchrow(QUERIES["get"], extension_id)
    if row is None:
        raise _not_found(extension_id)
    return _extension(row)


async def lock(conn: asyncpg.Connection, extension_id: str) -> None:
    """Keep others from changing an extension until the transaction ends.

    Raises:
        errors.NotFound: there is none.
    """
    if await conn.fetchval(QUERIES["lock"], extension_id) is None:
        raise _not_found(extension_id)


async def _require_idle(conn: asyncpg.Connection, extension_id: str) -> None:
    job = await conn.fetchrow(QUERIES["training_state"], extension_id)
    if job is not None and job["state"] in _ACTIVE:
        raise errors.Conflict(f"{extension_id} is being trained by {job['id']}", metadata={"job_id": job["id"]})


def _not_found(extension_id: str) -> errors.NotFound:
    return errors.NotFound(f"there is no extension {extension_id}", metadata={"id": extension_id})


def _extension(row: Mapping[str, Any]) -> Extension:
    lora = row["lora"]
    return Extension(
        **{name: row[name] for name in _COLUMNS},
        lora=Lora(**lora | {"target_modules": tuple(lora["target_modules"])}) if lora else None,
        layers=tuple(Layer(**layer) for layer in row["layers"]),
    )
