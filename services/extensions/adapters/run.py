"""A claimed training job as the training sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import asyncpg

from services.extensions.adapters.postgres import EVENT_PREFIX, QUERIES, PostgresStore, lock
from services.extensions.domain import (
    ARTIFACT_KIND,
    CHECKPOINT_KIND,
    MODEL_ARTIFACT,
    Extension,
    Sharer,
    TrainedExtension,
    Training,
)
from services.kit.jobs import Claim
from services.residency.lenses.extension_files import INSERTED_FILE, over_layers

T = TypeVar("T")


class ClaimedJob:
    """What runs of every kind do with their claim: every write is in a transaction that checks the fence first."""

    def __init__(self, claim: Claim, store: PostgresStore) -> None:
        self._claim = claim
        self._store = store

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._claim.job.id

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """Cancels it when the job is to stop."""
        return await self._claim.unless_stopped(work)

    async def waiting(self, reason: str | None) -> None:
        """Shown as `waiting_for`."""
        await self._claim.waiting(reason)

    async def publish(self, write: Callable[[Path], None]) -> str:
        """An artifact of kind `model`, under the claim's fence; its digest."""
        with self._store.artifacts.staging(MODEL_ARTIFACT) as folder:
            await asyncio.to_thread(write, folder)
            async with self._claim.commit() as conn:
                meta = {"job_id": self.job_id}
                artifact = await self._store.artifacts.publish(conn, MODEL_ARTIFACT, folder, meta)
        return artifact.digest


class ClaimedRun(ClaimedJob):
    """Implements the port `Run` on one claim."""

    @property
    def stopping(self) -> bool:
        """Whether the claim is to end."""
        return self._claim.stopping

    async def training(self) -> Training:
        """The job's row and payload."""
        return await self._store.training(self._claim.job)

    async def checkpoint(self) -> None:
        """Raises when the job is cancelled or paused, or the lease is lost."""
        await self._claim.checkpoint()

    async def progress(self, percent: float, figures: dict[str, object]) -> None:
        """The row's progress, and the event."""
        await self._claim.progress(percent, figures, f"{EVENT_PREFIX}:progress", figures)

    async def finalizing(self) -> None:
        """From now on the job cannot be paused."""
        await self._claim.finalizing()

    async def begun(self, loss_before: float) -> None:
        """Survives a crash, so that the loss before stays that of the weights before."""
        async with self._claim.commit() as conn:
            await conn.execute(QUERIES["begun"], self.job_id, loss_before)

    async def save(self, write: Callable[[Path], None]) -> None:
        """Publish the state; the former one is deleted once the new one counts."""
        with self._store.artifacts.staging(CHECKPOINT_KIND) as folder:
            await asyncio.to_thread(write, folder)
            async with self._claim.commit() as conn:
                meta = {"job_id": self.job_id, "fence": self._claim.fence}
                artifact = await self._store.artifacts.publish(conn, CHECKPOINT_KIND, folder, meta)
                former = await conn.fetchval(QUERIES["set_checkpoint"], self.job_id, artifact.uri)
        if former is not None and former != artifact.uri:
            await self._store.discard([former])

    async def finish(
        self, result: TrainedExtension, write: Callable[[Path], None] | None, sharers: Sequence[Sharer] = ()
    ) -> None:
        """Publish the next versions; the state to resume from is needed no more."""
        extension_id = self._claim.job.resource_id
        learnt = (result.steps, result.loss_before, result.loss_after)
        async with AsyncExitStack() as stack:
            staged = {} if write is None else await self._staged(stack, extension_id, write, sharers)
            async with self._claim.commit() as conn:
                for identifier in sorted({extension_id, *staged}):
                    await lock(conn, identifier)
                if write is None:
                    await conn.execute(QUERIES["finish_whole"], extension_id, *learnt)
                for identifier, folder in staged.items():
                    if identifier == extension_id:
                        version = await conn.fetchval(QUERIES["finish"], extension_id, *learnt)
                    else:
                        changed = result.shared.get(identifier, {}).get("loss_after")
                        version = await conn.fetchval(QUERIES["over_layers"], identifier, changed)
                    await self._add_version(conn, identifier, version, folder)
                former = await conn.fetchval(QUERIES["set_checkpoint"], self.job_id, None)
                await conn.execute(QUERIES["set_result"], self.job_id, result.as_dict())
        self._claim.finish_data(result.as_dict())
        if former is not None:
            await self._store.discard([former])

    async def _staged(
        self, stack: AsyncExitStack, extension_id: str, write: Callable[[Path], None], sharers: Sequence[Sharer]
    ) -> dict[str, Path]:
        """Folders of the extension and of those that share its layers, not published yet."""
        artifacts = self._store.artifacts
        own = stack.enter_context(artifacts.staging(ARTIFACT_KIND))
        await asyncio.to_thread(write, own)
        staged = {extension_id: own}
        for sharer in sharers:
            folder = await stack.enter_async_context(self._store.reading(sharer.extension.artifact_uri))
            staged[sharer.extension.id] = stack.enter_context(artifacts.staging(ARTIFACT_KIND))
            rewrite = await asyncio.to_thread(over_layers, folder, own / INSERTED_FILE)
            await asyncio.to_thread(rewrite, staged[sharer.extension.id])
        return staged

    async def _add_version(self, conn: asyncpg.Connection, extension_id: str, version: int, folder: Path) -> None:
        meta = {"job_id": self.job_id}
        artifact = await self._store.artifacts.publish(conn, ARTIFACT_KIND, folder, meta)
        row = (extension_id, version, artifact.uri, artifact.digest, artifact.size_bytes)
        await conn.execute(QUERIES["insert_version"], *row)


class ClaimedMerge(ClaimedJob):
    """Implements the port `MergeRun` on one claim."""

    @property
    def name(self) -> str:
        """From the request."""
        return str(self._claim.job.payload["name"])

    async def extension(self) -> Extension:
        """Its row, with the newest version."""
        return await self._store.get(self._claim.job.resource_id)
