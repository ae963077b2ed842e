"""A claimed evaluation as the job sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from services.kit import errors
from services.kit.jobs import Claim
from services.training.adapters.postgres import QUERIES, transcoder_of
from services.training.domain import EVALUATION_PREFIX, Transcoder, WantedEvaluation

T = TypeVar("T")


class ClaimedEvaluation:
    """Implements the port `Judging`."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim

    async def begin(self) -> tuple[WantedEvaluation, Transcoder]:
        """The evaluation's row and its transcoder's."""
        async with self._claim.commit() as conn:
            row = await conn.fetchrow(QUERIES["evaluation_of_job"], self._claim.job.id)
            if row is None:
                raise errors.NotFound("The transcoder was deleted", metadata={"id": self._claim.job.resource_id})
            return WantedEvaluation(**row["options"]), await transcoder_of(conn, row["transcoder_id"])

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

    async def publish(self, figures: Mapping[str, Any]) -> None:
        """The row's figures; they stand in the last event too."""
        async with self._claim.commit() as conn:
            await conn.execute(QUERIES["finish_evaluation"], self._claim.job.id, dict(figures))
        self._claim.finish_data(dict(figures))
