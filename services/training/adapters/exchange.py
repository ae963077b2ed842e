"""Exports and imports of transcoders on PostgreSQL, the artifact store, local directories and the hub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import astuple, replace
from pathlib import Path

from services.kit import errors
from services.kit.database import Database
from services.kit.idempotency import idempotent
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.residency.sources import Source, SourceNotFound, SourceUnavailable, fetch_folder
from services.training.adapters.postgres import QUERIES, PostgresStore
from services.training.domain import ARTIFACT_KIND, EXPORT_KIND, SAMPLES_KIND, NewTranscoder, Training, Transcoder
from services.training.exchange import WantedImport


class ExchangeStore:
    """Implements the port `Store` of exports and imports."""

    def __init__(self, store: PostgresStore, database: Database) -> None:
        self._store, self._database = store, database

    async def transcoder(self, transcoder_id: str) -> Transcoder:
        """The row."""
        return await self._store.transcoder(transcoder_id)

    async def training(self, job_id: str) -> Training:
        """The row; there is none for an imported transcoder."""
        return await self._store.training(job_id)

    def staging(self) -> AbstractContextManager[Path]:
        """In the artifact store's own file system."""
        return self._store.artifacts.staging(EXPORT_KIND)

    async def publish_export(self, transcoder_id: str, folder: Path) -> str:
        """An artifact whose row names the transcoder."""
        artifacts = self._store.artifacts
        sealed = await asyncio.to_thread(artifacts.seal, folder)
        async with self._database.transaction() as conn:
            artifact = await artifacts.publish(conn, EXPORT_KIND, folder, {"transcoder_id": transcoder_id}, sealed)
        return artifact.uri

    @asynccontextmanager
    async def reading_export(self, digest: str) -> AsyncIterator[Path]:
        """Under a lease."""
        async with self._store.artifacts.reading(self._database, f"artifact://{EXPORT_KIND}/{digest}") as folder:
            yield folder

    @asynccontextmanager
    async def reading_samples(self, transcoder_id: str) -> AsyncIterator[Path]:
        """Under a lease."""
        async with self._database.connection() as conn:
            uri = await conn.fetchval(QUERIES["newest_samples"], transcoder_id, SAMPLES_KIND)
        if uri is None:
            raise errors.NotFound(
                f"{transcoder_id} has no feature samples: evaluate it with samples_per_feature",
                metadata={"id": transcoder_id},
            )
        async with self._store.artifacts.reading(self._database, uri) as folder:
            yield folder

    async def add_imported(self, new: NewTranscoder, folder: Path, key: RequestKey) -> Transcoder:
        """Artifact and row in one transaction; its own id stands where a training's coder has its name."""
        artifacts = self._store.artifacts
        sealed = await asyncio.to_thread(artifacts.seal, folder)
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                made = new_id("tc")
                artifact = await artifacts.publish(conn, ARTIFACT_KIND, folder, {"transcoder_id": made}, sealed)
                row = (*astuple(replace(new, coder=made)), artifact.uri, artifact.size_bytes, key.caller)
                await conn.execute(QUERIES["insert_transcoder"], made, "", *row)
                request.answer = {"id": made}
        return await self._store.transcoder(request.answer["id"])


class ForeignFolders:
    """Implements the port `Sources`."""

    def __init__(self, roots: Sequence[Path], cache_dir: Path) -> None:
        """Use these.

        Args:
            roots: directories below which local files lie.
            cache_dir: where downloads are kept.
        """
        self._roots, self._cache_dir = roots, cache_dir

    async def folder(self, wanted: WantedImport) -> Path:
        """Below the model roots, or from the hub's cache."""
        source = Source(wanted.source, wanted.identifier, wanted.revision)
        try:
            return await asyncio.to_thread(fetch_folder, source, wanted.subfolder, self._roots, self._cache_dir)
        except SourceNotFound as error:
            raise errors.Invalid.of("identifier", str(error)) from error
        except SourceUnavailable as error:
            raise errors.Unavailable(str(error), retry_after=30.0) from error
