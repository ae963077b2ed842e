"""A claimed training job as the training sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from services.extensions.adapters.postgres import EVENT_PREFIX, QUERIES, PostgresStore, lock
from services.extensions.domain import ARTIFACT_KIND, CHECKPOINT_KIND, TrainedExtension, Training
from services.kit.jobs import Claim


class ClaimedRun:
    """Implements the port `Run` on one claim: every write is in a transaction that checks the fence first."""

    def __init__(self, claim: Claim, store: PostgresStore) -> None:
        self._claim = claim
        self._store = store

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._claim.job.id

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

    async def waiting(self, reason: str | None) -> None:
        """Shown as `waiting_for`."""
        await self._claim.waiting(reason)

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

    async def finish(self, result: TrainedExtension, write: Callable[[Path], None]) -> None:
        """Publish the next version; the state to resume from is needed no more."""
        with self._store.artifacts.staging(ARTIFACT_KIND) as folder:
            await asyncio.to_thread(write, folder)
            async with self._claim.commit() as conn:
                extension_id = self._claim.job.resource_id
                await lock(conn, extension_id)
                artifact = await self._store.artifacts.publish(conn, ARTIFACT_KIND, folder, {"job_id": self.job_id})
                version = await conn.fetchval(
                    QUERIES["finish"], extension_id, result.steps, result.loss_before, result.loss_after
                )
                row = (extension_id, version, artifact.uri, artifact.digest, artifact.size_bytes)
                await conn.execute(QUERIES["insert_version"], *row)
                former = await conn.fetchval(QUERIES["set_checkpoint"], self.job_id, None)
                await conn.execute(QUERIES["set_result"], self.job_id, result.as_dict())
        self._claim.finish_data(result.as_dict())
        if former is not None:
            await self._store.discard([former])
