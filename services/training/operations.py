"""The decisions of the training service: one function per rpc."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services.kit import errors
from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.training.domain import (
    Evaluation,
    Filter,
    Pruning,
    Queued,
    Retention,
    Training,
    Transcoder,
    Wanted,
    WantedComparison,
    WantedEvaluation,
)
from services.training.ports import Catalogue, Extraction, Files, Store
from services.training.requests import check_files, memory_bytes, resolve, wanted_again

DEFAULT_POINTS = 1000
DEFAULT_FEATURES = 10
MOST_COMPARED = 64
UNSTARTED = ""


class Operations:
    """What the servicer calls; raises `services.kit.errors` only."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        extraction: Extraction,
        files: Files,
        *,
        device: str,
        retention: Retention,
    ) -> None:
        """Use these ports.

        Args:
            store: trainings, transcoders, evaluations.
            catalogue: the registry.
            extraction: the extraction service.
            files: of caches.
            device: what a plan's bytes are counted for.
            retention: which checkpoints are kept where a request does not say.
        """
        self._store, self._catalogue, self._extraction, self._device = store, catalogue, extraction, device
        self._files, self._retention = files, retention

    async def create(self, wanted: Wanted, key: RequestKey, *, validate_only: bool) -> Training:
        """Queue a training, or only say what it would be and what it would take.

        Raises:
            errors.Invalid: a field is wrong; nothing was started.
            errors.NotFound: there is no such model, cache or dataset.
            errors.Conflict: the model's files were not read yet.
        """
        wanted = replace(wanted, retention=wanted.retention or self._retention)
        model = await self._catalogue.model(wanted.model_id)
        if not model.num_layers:
            raise errors.Conflict("the model's files were not read yet; load it once", metadata={"model_id": model.id})
        cache = await self._extraction.cache(wanted.cache_id) if wanted.cache_id else None
        if cache is None:
            await self._catalogue.require_dataset(wanted.dataset_id)
        plan = resolve(wanted, model, cache)
        if cache is not None:
            async with self._files.here(cache.storage_uri) as folder:
                if folder is not None:
                    await asyncio.to_thread(check_files, plan, folder)
        if not validate_only:
            return await self._store.queue(wanted, plan, key)
        widths = dict.fromkeys(plan.hook_points, model.hidden_size) if cache is None else cache.widths
        return Training(
            job_id=UNSTARTED,
            model_id=model.id,
            layers=wanted.layers,
            status="",
            progress=0.0,
            plan=plan,
            dataset_id=wanted.dataset_id or None,
            cache_id=wanted.cache_id or None,
            retention=wanted.retention or self._retention,
            figures={},
            checkpoints=(),
            transcoder_ids=(),
            error_code=None,
            error_message=None,
            waiting_for=None,
            created_by=key.caller,
            created_at=None,
            finished_at=None,
            estimated_memory_bytes=plan.ranks * memory_bytes(plan, widths, self._device)
            + (model.memory_bytes if plan.split else 0),
        )

    async def training(self, job_id: str) -> Training:
        """One training.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._store.training(job_id)

    async def trainings(self, wanted: Filter) -> Page:
        """Trainings, newest first."""
        return await self._store.trainings(wanted)

    async def history(self, job_id: str, points: int) -> list[dict[str, Any]]:
        """Figures of a training's steps, oldest first.

        Raises:
            errors.NotFound: there is no such training.
        """
        await self._store.training(job_id)
        return await self._store.history(job_id, points or DEFAULT_POINTS)

    async def cancel(self, job_id: str) -> Training:
        """Stop a training for good; its checkpoints stay.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has ended.
        """
        await self._store.training(job_id)
        await self._store.cancel(job_id)
        return await self._store.training(job_id)

    async def pause(self, job_id: str) -> Training:
        """Stop a training for now, with a checkpoint.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it has ended.
        """
        await self._store.training(job_id)
        await self._store.pause(job_id)
        return await self._store.training(job_id)

    async def resume(self, job_id: str) -> Training:
        """Let a paused training go on from its checkpoint.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: it is not paused.
        """
        await self._store.training(job_id)
        await self._store.resume(job_id)
        return await self._store.training(job_id)

    async def finalize(self, job_id: str, checkpoint_id: str) -> Training:
        """Make transcoders of a checkpoint, the newest where none is named.

        Raises:
            errors.NotFound: there is no such training, or it has no such checkpoint.
            errors.Conflict: it runs, waits or has completed.
        """
        training = await self._store.training(job_id)
        await self._store.finalize(job_id, _checkpoint(training, checkpoint_id))
        return await self._store.training(job_id)

    async def prune(self, job_id: str, retention: Retention | None, *, validate_only: bool) -> Pruning:
        """Delete the checkpoints that a retention, else the training's own, does not keep, or only say which.

        Raises:
            errors.NotFound: there is no such training.
        """
        return await self._store.prune(job_id, retention, validate_only=validate_only)

    async def config(self, job_id: str) -> Wanted:
        """The request for the same training, with nothing left open.

        Raises:
            errors.NotFound: there is no such training.
        """
        return wanted_again(await self._store.training(job_id))

    async def clone(self, job_id: str, key: RequestKey, *, validate_only: bool) -> Training:
        """Queue the same training once more, or only say what it would be.

        Raises:
            errors.NotFound: there is no such training, or its model, cache or dataset is gone.
        """
        return await self.create(await self.config(job_id), key, validate_only=validate_only)

    async def transcoder(self, transcoder_id: str) -> Transcoder:
        """One transcoder.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._store.transcoder(transcoder_id)

    async def transcoders(self, wanted: Filter) -> Page:
        """Transcoders, newest first."""
        return await self._store.transcoders(wanted)

    async def delete_transcoder(self, transcoder_id: str) -> None:
        """Delete a transcoder and its evaluations.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: `IN_USE`: a lens is made of it, or somebody reads it.
        """
        transcoder = await self._store.transcoder(transcoder_id)
        if lenses := await self._catalogue.lenses_of(transcoder):
            raise errors.Conflict(
                f"{', '.join(lenses)} use {transcoder_id}", reason="IN_USE", metadata={"lenses": ", ".join(lenses)}
            )
        await self._store.delete_transcoder(transcoder_id)

    async def evaluate(self, wanted: WantedEvaluation, key: RequestKey) -> Queued:
        """Queue an evaluation on held-out text.

        Raises:
            errors.NotFound: there is no such transcoder or dataset.
            errors.Invalid: the prefix does not exist, or mode cpu is to be split.
        """
        _check_devices(wanted)
        transcoder = await self._store.transcoder(wanted.transcoder_id)
        groups = len(transcoder.group_sizes)
        if wanted.prefix > groups:
            raise errors.Invalid.of("prefix", f"the transcoder has {groups} groups", groups=groups)
        await self._catalogue.require_dataset(wanted.dataset_id)
        return await self._store.queue_evaluation(wanted, key)

    async def compare(self, wanted: WantedComparison, key: RequestKey) -> list[tuple[WantedEvaluation, Queued]]:
        """Queue evaluations on the same text, a job each: they spread over the devices.

        Of transcoders first, then of the checkpoints' coders, each in the order of the request.

        Raises:
            errors.NotFound: there is no such transcoder, training, checkpoint or dataset.
            errors.Invalid: they are fewer than two, one does not have the prefix, they are of several models, whose
                losses say nothing about each other, or mode cpu is to be split.
        """
        _check_devices(wanted.common)
        found: list[tuple[WantedEvaluation, str, int]] = []
        for name in wanted.transcoder_ids:
            one = await self._store.transcoder(name)
            found.append((replace(wanted.common, transcoder_id=name), one.model_id, len(one.group_sizes)))
        for index, (job_id, checkpoint_id, coder) in enumerate(wanted.checkpoints):
            training = await self._store.training(job_id)
            checkpoint = _checkpoint(training, checkpoint_id)
            names = [spec for spec in training.plan.coders if coder in ("", spec.name)]
            if not names:
                raise errors.Invalid.of(f"checkpoints[{index}].coder", f"{job_id} has no coder {coder}")
            for spec in names:
                one_of = replace(wanted.common, training_id=job_id, checkpoint_id=checkpoint, coder=spec.name)
                found.append((one_of, training.model_id, len(spec.config["group_sizes"])))
        if len(found) < 2:
            raise errors.Invalid.of("transcoder_ids", "there is nothing to compare: one alone is evaluated")
        if len(found) > MOST_COMPARED:
            raise errors.Invalid.of("checkpoints", f"hold {len(found)} coders in all, {MOST_COMPARED} are compared")
        if len(models := {model for _, model, _ in found}) > 1:
            raise errors.Invalid.of("transcoder_ids", f"are of {len(models)} models")
        if wanted.common.prefix > (groups := min(groups for _, _, groups in found)):
            raise errors.Invalid.of("prefix", f"one of them has {groups} groups", groups=groups)
        await self._catalogue.require_dataset(wanted.common.dataset_id)
        evaluations = [one for one, _, _ in found]
        return list(zip(evaluations, await self._store.queue_evaluations(evaluations, key), strict=True))

    async def newest_density(self, transcoder_id: str) -> list[int]:
        """Density histogram of a transcoder's newest evaluation.

        Raises:
            errors.NotFound: there is no such transcoder, or it was not evaluated.
        """
        page = await self.evaluations(Filter(transcoder_id=transcoder_id, limit=1))
        if not page.items:
            raise errors.NotFound(f"{transcoder_id} was not evaluated yet", metadata={"id": transcoder_id})
        return page.items[0].figures["density_histogram"]

    async def evaluations_by_id(self, ids: Sequence[str]) -> list[Evaluation]:
        """Evaluations side by side: those that have ended well, in the order of the ids."""
        return await self._store.evaluations_by_id(ids)

    async def evaluations(self, wanted: Filter) -> Page:
        """Evaluations of a transcoder, newest first.

        Raises:
            errors.NotFound: there is no such transcoder.
        """
        await self._store.transcoder(wanted.transcoder_id)
        return await self._store.evaluations(wanted)

    async def encode(self, transcoder_id: str, text: str, token_ids: tuple[int, ...], top_k: int, prefix: int) -> Any:
        """Features of a text, per token.

        Raises:
            errors.NotFound: there is no such transcoder.
            errors.Invalid: text and token_ids are both given or both missing, or the prefix does not exist.
        """
        transcoder = await self._store.transcoder(transcoder_id)
        groups = len(transcoder.group_sizes)
        if prefix > groups:
            raise errors.Invalid.of("prefix", f"the transcoder has {groups} groups", groups=groups)
        return await self._catalogue.encode(transcoder, text, token_ids, top_k or DEFAULT_FEATURES, prefix)


def _check_devices(wanted: WantedEvaluation) -> None:
    if wanted.devices > 1 and wanted.mode == "cpu":
        raise errors.Invalid.of("devices", "mode cpu is one memory, over which nothing is split")


def _checkpoint(training: Training, checkpoint_id: str) -> str:
    """One of the training's, the newest where none is named."""
    known = [checkpoint.id for checkpoint in training.checkpoints]
    if not known or (checkpoint_id and checkpoint_id not in known):
        raise errors.NotFound(
            f"{training.job_id} has no checkpoint {checkpoint_id}".rstrip(),
            metadata={"job_id": training.job_id, "known": len(known)},
        )
    return checkpoint_id or known[-1]
