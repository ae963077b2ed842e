"""A claimed evaluation as the job sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.jobs import Claim
from services.training.adapters.postgres import QUERIES, checkpoints_of, transcoder_of
from services.training.domain import EVALUATION_PREFIX, SAMPLES_KIND, Judged, Plan, WantedEvaluation

T = TypeVar("T")


class ClaimedEvaluation:
    """Implements the port `Judging`."""

    def __init__(self, claim: Claim, artifacts: ArtifactStore) -> None:
        self._claim, self._artifacts = claim, artifacts
        self._transcoder_id = ""

    @property
    def job_id(self) -> str:
        """Its job's."""
        return self._claim.job.id

    async def begin(self) -> tuple[WantedEvaluation, Judged]:
        """The evaluation's row and its transcoder's, or its training's and checkpoint's."""
        async with self._claim.commit() as conn:
            row = await conn.fetchrow(QUERIES["evaluation_of_job"], self._claim.job.id)
            if row is None:
                raise errors.NotFound("The transcoder was deleted", metadata={"id": self._claim.job.resource_id})
            wanted = WantedEvaluation(**row["options"])
            if wanted.checkpoint_id:
                return wanted, await _of_checkpoint(conn, wanted)
            self._transcoder_id = wanted.transcoder_id
            found = await transcoder_of(conn, wanted.transcoder_id)
            facts = (found.model_id, found.layer, found.base_digest, found.artifact_uri)
            return wanted, Judged(*facts, {"transcoder_id": found.id})

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, or the reason to stop."""
        return await self._claim.unless_stopped(work)

    async def checkpoint(self) -> None:
        """Raises when the job is to stop, or the lease is lost."""
        await self._claim.checkpoint()

    async def waiting(self, reason: str | None) -> None:
        """Shown as `waiting_for`."""
        await self._claim.waiting(reason)

    async def progress(self, percent: float, figures: Mapping[str, Any]) -> None:
        """Row and event."""
        await self._claim.progress(percent, dict(figures), f"{EVALUATION_PREFIX}:progress", dict(figures))

    def staging(self) -> AbstractContextManager[Path]:
        """In the artifact store's own file system."""
        return self._artifacts.staging(SAMPLES_KIND)

    async def publish(self, figures: Mapping[str, Any], samples: Path | None = None) -> None:
        """The row's figures, and the samples' artifact; the figures stand in the last event too."""
        sealed = None if samples is None else await asyncio.to_thread(self._artifacts.seal, samples)
        async with self._claim.commit() as conn:
            if samples is not None:
                meta = {"transcoder_id": self._transcoder_id}
                await self._artifacts.publish(conn, SAMPLES_KIND, samples, meta, sealed)
            await conn.execute(QUERIES["finish_evaluation"], self._claim.job.id, dict(figures))
        self._claim.finish_data(dict(figures))


async def _of_checkpoint(conn: asyncpg.Connection, wanted: WantedEvaluation) -> Judged:
    row = await conn.fetchrow(QUERIES["training"], wanted.training_id)
    found = [one for one in await checkpoints_of(conn, wanted.training_id) if one.id == wanted.checkpoint_id]
    if row is None or not found:
        raise errors.NotFound("The checkpoint was deleted", metadata={"id": wanted.checkpoint_id})
    plan = Plan.from_json(row["plan"])
    coder = next(one for one in plan.coders if one.name == wanted.coder)
    names = {"training_job_id": wanted.training_id, "checkpoint": wanted.checkpoint_id, "coder": wanted.coder}
    return Judged(row["model_id"], coder.layer, plan.base_digest, found[0].artifact_uri, names, coder)
