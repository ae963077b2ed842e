"""The evaluation job: a transcoder, or a coder of a checkpoint, on held-out text, batch by batch between other work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from services.kit import errors
from services.residency.failures import insufficient_memory
from services.residency.families import Family, base_model, submodule
from services.residency.host_copy import device_bound, host_copy
from services.residency.lenses.transcoder import Transcoder as Weights
from services.residency.memory import give_back
from services.training import feature_files, state_files
from services.training.compute.evaluation import Evaluation
from services.training.compute.features import FeatureSampler, logit_effects, nearest_rows
from services.training.compute.trainer import coders_of
from services.training.domain import Judged, WantedEvaluation
from services.training.job_ports import Batch, Files, HeldOut, Judging, LeasedModel, Models
from services.training.requests import batches_for

LEAST_TOLD_SECONDS = 0.5


class EvaluationJob:
    """Runs claimed evaluations."""

    def __init__(self, models: Models, held_out: HeldOut, files: Files) -> None:
        self._models, self._held_out, self._files = models, held_out, files

    async def run(self, run: Judging) -> dict[str, Any]:
        """Do what the claim says; returns the job's result.

        Raises:
            errors.Invalid: the dataset cannot be used, or its text has no token to compare.
            errors.Conflict: `LENS_INCOMPATIBLE`: the model is not the one that the transcoder was trained on.
            errors.Exhausted: `DEVICE_OOM`, in the smallest mode too; `INSUFFICIENT_MEMORY`: of the host, in mode cpu.
            errors.Unsupported: mode cpu of a model whose weights run on a GPU only.
        """
        wanted, judged = await run.begin()
        await run.waiting("the model")
        await run.unless_stopped(self._models.bring(judged.model_id))
        await run.waiting(None)
        async with (
            self._models.lease(judged.model_id) as model,
            self._files.reading(judged.artifact_uri) as folder,
        ):
            _check(judged, model)
            figures, sampling = await self._figures(run, wanted, _Subject(judged, folder), model)
            if sampling is None:
                await run.publish(figures)
            else:
                with run.staging() as staged:
                    facts = {"model_id": judged.model_id, "layer": judged.layer, "transcoder_id": judged.transcoder_id}
                    facts["dataset_id"] = wanted.dataset_id
                    await sampling.place.run(_write_samples, staged, sampling, model, facts)
                    await run.publish(figures, staged)
        return {**judged.names, **figures}

    async def _figures(
        self, run: Judging, wanted: WantedEvaluation, subject: _Subject, model: LeasedModel
    ) -> tuple[dict[str, Any], _Sampling | None]:
        """In the mode that was asked for; `auto` takes the next smaller one when the device's memory runs out."""
        modes = modes_of(wanted.mode)
        for mode in modes:
            most, size = wanted.num_batches or batches_for(mode, model.weight_bytes), wanted.batch_size
            if mode != modes[0]:  # the same text, a sequence at a time
                most, size = most * (size or model.facts.model_batch_size), 1
                await model.run(give_back, model.device)
            try:
                batches = await self._held_out.batches(replace(wanted, batch_size=size), model, most)
                found, sampling = await _in_mode(run, wanted, subject, model, mode=mode, batches=batches)
                return {"mode": mode, **found}, sampling
            except errors.Exhausted as error:
                if error.reason != "DEVICE_OOM" or mode == modes[-1]:
                    raise
        raise AssertionError("there is always a mode")


async def _in_mode(
    run: Judging,
    wanted: WantedEvaluation,
    subject: _Subject,
    model: LeasedModel,
    *,
    mode: str,
    batches: list[Batch],
) -> tuple[dict[str, Any], _Sampling | None]:
    place = await _place(mode, model)
    weights = await place.run(subject.weights, place.device)
    sampler = None
    if wanted.samples_per_feature:
        sampler = FeatureSampler(weights.dict_size, wanted.samples_per_feature, place.device)
    found = await _measured(run, wanted, weights, model.family, place, batches=batches, sampler=sampler)
    return found, None if sampler is None else _Sampling(sampler, weights, place)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is judged, and its files."""

    judged: Judged
    folder: Path

    def weights(self, device: str) -> Weights:
        """Of the transcoder, or of a checkpoint's coder as it was then."""
        if self.judged.coder is None:
            return Weights.load(self.folder, device)
        name = self.judged.coder.name
        (tensors, facts), _ = state_files.read(self.folder)
        (coder,) = coders_of((tensors, {**facts, "coders": {name: facts["coders"][name]}}))
        with torch.no_grad():
            return coder.transcoder(self.judged.coder.hook_points).to(device)


class _Place(NamedTuple):
    """Where the forwards run."""

    model: nn.Module
    device: str
    run: Callable[..., Awaitable[Any]]


class _Sampling(NamedTuple):
    sampler: FeatureSampler
    weights: Weights
    place: _Place


async def _place(mode: str, model: LeasedModel) -> _Place:
    """The model where it is; for mode cpu, where that is a GPU, a copy in this host's memory."""
    if mode != "cpu" or model.device == "cpu":
        return _Place(model.model, model.device, model.run)
    if bound := await model.run(device_bound, model.model):
        raise errors.Unsupported(
            f"weights in the format {bound} run on a GPU only", metadata={"device": model.device, "format": bound}
        )
    free = psutil.virtual_memory().available
    if model.weight_bytes > free:
        raise insufficient_memory(model.weight_bytes, free)
    return _Place(await model.run(host_copy, model.model), "cpu", asyncio.to_thread)


async def _measured(
    run: Judging,
    wanted: WantedEvaluation,
    weights: Weights,
    family: Family,
    place: _Place,
    *,
    batches: list[Batch],
    sampler: FeatureSampler | None,
) -> dict[str, Any]:
    begin = told = time.monotonic()
    evaluation = Evaluation(place.model, family, weights, wanted.prefix or None, sampler)
    steps = [(evaluation.read, batch) for batch in batches] + [(evaluation.score, batch[:2]) for batch in batches]
    for done, (step, batch) in enumerate(steps, start=1):
        await run.checkpoint()
        await place.run(_on, place.device, step, batch)
        if done == len(steps) or time.monotonic() - told >= LEAST_TOLD_SECONDS:
            told = time.monotonic()
            await run.progress(100 * done / len(steps), {"batches": len(batches), "passes_done": done})
    try:
        found = asdict(evaluation.result())
    except ValueError as error:
        raise errors.Invalid.of("dataset_id", str(error)) from error
    per_prefix = found["fvu_per_prefix"]
    return {
        **found,
        "fvu_min": min(per_prefix),
        "fvu_max": max(per_prefix),
        "fvu_mean": sum(per_prefix) / len(per_prefix),
        "prefix": len(per_prefix),
        "seconds": time.monotonic() - begin,
    }


def _write_samples(folder: Path, sampling: _Sampling, model: LeasedModel, facts: dict[str, Any]) -> None:
    """Contexts, and what only the weights tell: effects on the logits and neighbours; texts of all tokens in them."""
    sampler, weights, place = sampling
    base = base_model(place.model)
    norm = submodule(base, model.family.final_norm).weight.detach() + model.family.gain_offset
    logit_ids, logits = logit_effects(weights, submodule(base, model.family.unembedding).weight.detach(), norm)
    nearest, cosines = nearest_rows(weights)
    contexts = sampler.contexts
    tensors = {"latent": contexts.latent, "tokens": contexts.tokens, "values": contexts.values}
    tensors |= {"counts": sampler.counts, "logit_ids": logit_ids, "logits": logits}
    used = torch.cat([contexts.tokens.flatten(), logit_ids.flatten()]).unique().tolist()
    texts = {str(token): _text_of(model.tokenizer, token) for token in used if token >= 0}
    facts |= {"strings": texts, "rows": sampler.rows, "sequences": sampler.sequences, "length": sampler.length}
    feature_files.write(folder, {**tensors, "nearest": nearest, "cosines": cosines}, facts)


def _text_of(tokenizer: Any, token: int) -> str:
    return str(token) if tokenizer is None else tokenizer.decode([token])


def modes_of(mode: str) -> tuple[str, ...]:
    """The modes to try, in order."""
    return ("full", "safe", "cpu") if mode == "auto" else (mode,)


def _check(judged: Judged, model: LeasedModel) -> None:
    if judged.base_digest != model.digest:
        raise errors.Conflict(
            "the transcoder was trained on another base",
            reason="LENS_INCOMPATIBLE",
            metadata={"expected": judged.base_digest, "found": model.digest},
        )


def _on(device: str, step: Any, batch: tuple[Any, ...]) -> None:
    step(*(part.to(device) for part in batch))
