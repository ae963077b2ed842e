"""What the operations need of others, as they see them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.training.domain import (
    BaseModel,
    Cache,
    Evaluation,
    Filter,
    Plan,
    Pruning,
    Queued,
    Retention,
    Training,
    Transcoder,
    Wanted,
    WantedEvaluation,
)


class Catalogue(Protocol):
    """The registry."""

    async def model(self, model_id: str) -> BaseModel:
        """A registered model.

        Raises:
            errors.NotFound: `MODEL_NOT_FOUND`.
        """

    async def require_dataset(self, dataset_id: str) -> None:
        """There is such a dataset.

        Raises:
            errors.NotFound: there is none.
        """

    async def lenses_of(self, transcoder: Transcoder) -> list[str]:
        """Ids of the lenses that use a transcoder."""

    async def encode(
        self, transcoder: Transcoder, text: str, token_ids: tuple[int, ...], top_k: int, prefix: int
    ) -> Any:
        """A text read through a transcoder on the host that has its model: the host's own answer.

        Raises:
            errors.Invalid: text and token_ids are both given or both missing, or the prefix does not exist.
        """


class Extraction(Protocol):
    """The extraction service."""

    async def cache(self, cache_id: str) -> Cache:
        """An activation cache.

        Raises:
            errors.NotFound: there is none.
        """


class Files(Protocol):
    """Published files."""

    def here(self, uri: str) -> AbstractAsyncContextManager[Path | None]:
        """A directory that is not deleted inside the block; None where another host has it."""


class Store(Protocol):
    """Trainings, transcoders and evaluations as rows."""

    async def queue(self, wanted: Wanted, plan: Plan, key: RequestKey) -> Training:
        """Store a training and queue its job, or answer what the same request got before.

        Raises:
            errors.Conflict: `REQUEST_ID_REUSED`.
        """

    async def training(self, job_id: str) -> Training:
        """One training.

        Raises:
            errors.NotFound: there is none.
        """

    async def trainings(self, wanted: Filter) -> Page:
        """Trainings, newest first."""

    async def history(self, job_id: str, points: int) -> list[dict[str, Any]]:
        """Figures of at most so many steps, evenly thinned, oldest first; the last one always."""

    async def cancel(self, job_id: str) -> None:
        """Ask its job to stop for good.

        Raises:
            errors.Conflict: it has ended.
        """

    async def pause(self, job_id: str) -> None:
        """Ask its job to stop for now.

        Raises:
            errors.Conflict: it has ended.
        """

    async def resume(self, job_id: str) -> None:
        """Queue a paused job.

        Raises:
            errors.Conflict: it is not paused.
        """

    async def finalize(self, job_id: str, checkpoint_id: str) -> None:
        """Queue a job that was stopped or has failed, to make transcoders of a checkpoint.

        Raises:
            errors.Conflict: it runs, waits or has completed.
            errors.NotFound: the checkpoint was deleted meanwhile.
        """

    async def prune(self, job_id: str, retention: Retention | None, *, validate_only: bool) -> Pruning:
        """Delete the checkpoints that a retention, else the training's own, does not keep, or only say which.

        Raises:
            errors.NotFound: there is no such training.
        """

    async def transcoder(self, transcoder_id: str) -> Transcoder:
        """One transcoder.

        Raises:
            errors.NotFound: there is none.
        """

    async def transcoders(self, wanted: Filter) -> Page:
        """Transcoders, newest first."""

    async def delete_transcoder(self, transcoder_id: str) -> None:
        """Delete its row, and its files unless another transcoder has the same.

        Raises:
            errors.Conflict: `IN_USE`: somebody reads its files.
        """

    async def queue_evaluation(self, wanted: WantedEvaluation, key: RequestKey) -> Queued:
        """Store an evaluation and queue its job, or answer what the same request got before.

        Raises:
            errors.Conflict: `REQUEST_ID_REUSED`.
        """

    async def queue_evaluations(self, wanted: Sequence[WantedEvaluation], key: RequestKey) -> list[Queued]:
        """The same for several, all or none of them; a checkpoint stays for as long as one of them needs it.

        Raises:
            errors.NotFound: a checkpoint was deleted meanwhile.
            errors.Conflict: `REQUEST_ID_REUSED`.
        """

    async def evaluations_by_id(self, ids: Sequence[str]) -> list[Evaluation]:
        """Those of the named evaluations that have ended well, in the order of the ids."""

    async def evaluations(self, wanted: Filter) -> Page:
        """Evaluations of a transcoder that have ended well, newest first."""
