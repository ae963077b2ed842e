"""The evaluation job: one transcoder on held-out text, batch by batch between other work of the device."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.kit import errors
from services.residency.families import base_model, submodule
from services.residency.lenses.transcoder import Transcoder as Weights
from services.training import feature_files
from services.training.compute.evaluation import Evaluation
from services.training.compute.features import FeatureSampler, logit_effects, nearest_rows
from services.training.domain import Transcoder, WantedEvaluation
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
            errors.Exhausted: `DEVICE_OOM`, in the smallest mode too.
        """
        wanted, transcoder = await run.begin()
        await run.waiting("the model")
        await run.unless_stopped(self._models.bring(transcoder.model_id))
        await run.waiting(None)
        async with (
            self._models.lease(transcoder.model_id) as model,
            self._files.reading(transcoder.artifact_uri) as folder,
        ):
            _check(transcoder, model)
            weights = await model.run(Weights.load, folder, model.device)
            figures, sampler = await self._judged(run, wanted, weights, model)
            if sampler is None:
                await run.publish(figures)
            else:
                with run.staging() as staged:
                    facts = {"model_id": transcoder.model_id, "layer": transcoder.layer, "transcoder_id": transcoder.id}
                    facts["dataset_id"] = wanted.dataset_id
                    await model.run(_write_samples, staged, sampler, weights, model, facts)
                    await run.publish(figures, staged)
        return {"transcoder_id": transcoder.id, **figures}

    async def _judged(
        self, run: Judging, wanted: WantedEvaluation, weights: Weights, model: LeasedModel
    ) -> tuple[dict[str, Any], FeatureSampler | None]:
        """In the mode that was asked for; `auto` takes the next smaller one when memory runs out."""
        modes = modes_of(wanted.mode, model.device)
        for mode in modes:
            most = wanted.num_batches or batches_for(mode, model.weight_bytes)
            try:
                batches = await self._held_out.batches(wanted, model, most)
                sampler = None
                if wanted.samples_per_feature:
                    sampler = FeatureSampler(weights.dict_size, wanted.samples_per_feature, model.device)
                return {
                    "mode": mode,
                    **await _measured(run, wanted, weights, model, batches=batches, sampler=sampler),
                }, sampler
            except errors.Exhausted as error:
                if error.reason != "DEVICE_OOM" or mode == modes[-1]:
                    raise
        raise AssertionError("there is always a mode")


async def _measured(
    run: Judging,
    wanted: WantedEvaluation,
    weights: Weights,
    model: LeasedModel,
    *,
    batches: list[Batch],
    sampler: FeatureSampler | None,
) -> dict[str, Any]:
    begin = told = time.monotonic()
    evaluation = Evaluation(model.model, model.family, weights, wanted.prefix or None, sampler)
    steps = [(evaluation.read, batch) for batch in batches] + [(evaluation.score, batch[:2]) for batch in batches]
    for done, (step, batch) in enumerate(steps, start=1):
        await run.checkpoint()
        await model.run(_on, model.device, step, batch)
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


def _write_samples(
    folder: Path,
    sampler: FeatureSampler,
    weights: Weights,
    model: LeasedModel,
    facts: dict[str, Any],
) -> None:
    """Contexts, and what only the weights tell: effects on the logits and neighbours; texts of all tokens in them."""
    base = base_model(model.model)
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


def modes_of(mode: str, device: str) -> tuple[str, ...]:
    """The modes to try, in order, where the model is on `device`.

    Raises:
        errors.Unsupported: cpu, but the model is on a GPU.
    """
    on_cpu = device == "cpu"
    if mode == "auto":
        return ("full", "safe", "cpu") if on_cpu else ("full", "safe")
    if mode == "cpu" and not on_cpu:
        raise errors.Unsupported("this process evaluates on its GPU only", metadata={"device": device})
    return (mode,)


def _check(transcoder: Transcoder, model: LeasedModel) -> None:
    if transcoder.base_digest != model.digest:
        raise errors.Conflict(
            "the transcoder was trained on another base",
            reason="LENS_INCOMPATIBLE",
            metadata={"expected": transcoder.base_digest, "found": model.digest},
        )


def _on(device: str, step: Any, batch: tuple[Any, ...]) -> None:
    step(*(part.to(device) for part in batch))
