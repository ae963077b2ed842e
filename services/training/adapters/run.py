"""A claimed training as the job sees it: every write is in a transaction that checks the fence first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from services.kit import errors
from services.kit.ids import new_id
from services.kit.jobs import Claim
from services.training.adapters import trackers
from services.training.adapters.metrics import TrainingMetrics
from services.training.adapters.postgres import QUERIES, PostgresStore, checkpoints_of, judged
from services.training.adapters.trackers import Tracker
from services.training.dialogue import Saved
from services.training.domain import ARTIFACT_KIND, CHECKPOINT_KIND, EVENT_PREFIX, NewTranscoder, Plan, Retention, Task
from services.training.retention import kept

T = TypeVar("T")


class ClaimedRun:
    """Implements the port `Run`."""

    def __init__(self, claim: Claim, store: PostgresStore, metrics: TrainingMetrics, tracked: Path) -> None:
        """Take a claim.

        Args:
            claim: of the job.
            store: the rows.
            metrics: what operators see.
            tracked: where external trackers keep their files.
        """
        self._claim = claim
        self._store = store
        self._metrics = metrics
        self._tokens_told = 0
        self._tracked = tracked
        self._tracker: Tracker | None = None
        self._id = claim.job.id

    async def begin(self) -> Task:
        """The training's rows."""
        async with self._claim.commit() as conn:
            row = await conn.fetchrow(QUERIES["training"], self._id)
            if row is None:
                raise errors.NotFound(f"There is no training {self._id}", metadata={"id": self._id})
            found = await checkpoints_of(conn, self._id)
            made = [one["id"] for one in await conn.fetch(QUERIES["made_by"], [self._id])]
        wanted = [one for one in found if row["finalize_id"] in (None, one.id)]
        self._tokens_told = wanted[-1].tokens_seen if wanted else 0
        self._claim.finish_data({"transcoder_ids": made} if made else {})
        plan = Plan.from_json(row["plan"])
        if plan.tracker and not made:
            self._tracker = trackers.start(plan.tracker, self._id, plan.as_json(), self._tracked)
        return Task(
            job_id=self._id,
            model_id=row["model_id"],
            dataset_id=row["dataset_id"],
            cache_id=row["cache_id"],
            plan=plan,
            checkpoint=wanted[-1] if wanted else None,
            finalize=row["finalize_id"] is not None,
            transcoder_ids=tuple(made),
            created_by=row["created_by"],
        )

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, or the reason to stop."""
        return await self._claim.unless_stopped(work)

    async def waiting(self, reason: str | None) -> None:
        """Shown as `waiting_for`."""
        await self._claim.waiting(reason)

    async def settle(self, plan: Plan, cache_id: str, step: int) -> None:
        """The plan's row; points of steps that will be made again are dropped."""
        async with self._claim.commit() as conn:
            await conn.execute(QUERIES["settle"], self._id, plan.as_json(), cache_id or None)
            await conn.execute(QUERIES["forget_points"], self._id, step)

    async def progress(self, percent: float, figures: Mapping[str, Any]) -> None:
        """One transaction for all three."""

        async def write() -> None:
            async with self._claim.commit() as conn:
                await conn.execute(QUERIES["add_point"], self._id, figures["step"], dict(figures))
                await self._claim.progress(percent, dict(figures), f"{EVENT_PREFIX}:progress", dict(figures))

        await self._claim.insist(write)
        if self._tracker is not None:
            self._tracker.tell(figures)
        self._metrics.told(figures, figures["tokens_seen"] - self._tokens_told)
        self._tokens_told = figures["tokens_seen"]

    async def close(self) -> None:
        """The attempt is over, however it ended: a tracker sends what it has."""
        if self._tracker is not None:
            await asyncio.to_thread(self._tracker.close)

    async def finalizing(self) -> None:
        """It can be cancelled, but no longer paused."""
        await self._claim.finalizing()

    def staging(self, kind: str) -> AbstractContextManager[Path]:
        """In the artifact store's own file system."""
        return self._store.artifacts.staging(kind)

    async def checkpointed(self, folder: Path, saved: Saved) -> None:
        """Files first; their row counts only under our fence."""
        artifacts, fence = self._store.artifacts, self._claim.fence
        sealed = await asyncio.to_thread(artifacts.seal, folder)
        async with self._claim.commit() as conn:
            meta = {"job_id": self._id, "fence": fence}
            artifact = await artifacts.publish(conn, CHECKPOINT_KIND, folder, meta, sealed)
            row = (new_id("ckpt"), self._id, fence, *astuple(saved), artifact.uri, artifact.size_bytes)
            await conn.execute(QUERIES["add_checkpoint"], *row)
            retention = Retention(**(await conn.fetchrow(QUERIES["lock_training"], self._id))["retention"])
            needed = kept(await checkpoints_of(conn, self._id), retention) | await judged(conn, self._id)
            dropped = await conn.fetch(QUERIES["drop_checkpoints"], self._id, list(needed))
        await self._store.discard(one["artifact_uri"] for one in dropped)

    async def publish(self, made: Sequence[tuple[NewTranscoder, Path]]) -> list[str]:
        """Artifacts and rows of all transcoders, or of none."""
        artifacts = self._store.artifacts
        sealed = [await asyncio.to_thread(artifacts.seal, folder) for _, folder in made]
        ids = [new_id("tc") for _ in made]
        async with self._claim.commit() as conn:
            for transcoder_id, (new, folder), seal in zip(ids, made, sealed, strict=True):
                meta = {"transcoder_id": transcoder_id, "job_id": self._id}
                artifact = await artifacts.publish(conn, ARTIFACT_KIND, folder, meta, seal)
                row = (*astuple(new), artifact.uri, artifact.size_bytes, self._claim.job.created_by)
                await conn.execute(QUERIES["insert_transcoder"], transcoder_id, self._id, *row)
            await conn.fetchrow(QUERIES["lock_training"], self._id)
            needed = await judged(conn, self._id)
            dropped = await conn.fetch(QUERIES["drop_checkpoints"], self._id, list(needed))
        self._claim.finish_data({"transcoder_ids": ids})
        await self._store.discard(one["artifact_uri"] for one in dropped)
        return ids
