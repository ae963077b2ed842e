"""The evaluation job: a transcoder, or a coder of a checkpoint, on held-out text, batch by batch between other work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from torch import nn

from services.kit import errors
from services.residency.failures import insufficient_memory
from services.residency.host_copy import device_bound, host_copy
from services.residency.memory import give_back
from services.training.compute.evaluation import Evaluation
from services.training.domain import Judged, WantedEvaluation
from services.training.job_ports import Batch, Files, HeldOut, Judging, KnownModel, LeasedModel, Models
from services.training.judgements import LEAST_TOLD_SECONDS, Sampled, Subject, figures_of, on, sampler_of, steps_of
from services.training.judging_split import OverDevices, Splitting
from services.training.requests import batches_for


class EvaluationJob:
    """Runs claimed evaluations."""

    def __init__(self, models: Models, held_out: HeldOut, files: Files, splitting: Splitting) -> None:
        self._models, self._held_out, self._files, self._splitting = models, held_out, files, splitting

    async def run(self, run: Judging) -> dict[str, Any]:
        """Do what the claim says; returns the job's result.

        Raises:
            errors.Invalid: the dataset cannot be used, or its text has no token to compare.
            errors.Conflict: `LENS_INCOMPATIBLE`: the model is not the one that the transcoder was trained on.
            errors.Exhausted: `DEVICE_OOM`, in the smallest mode too; `INSUFFICIENT_MEMORY`: of the host, in mode cpu,
                or of the devices that the model is split over.
            errors.Failed: the process that has the model split ended, or cannot load it.
            errors.Unsupported: mode cpu of a model whose weights run on a GPU only; there are not so many devices.
        """
        wanted, judged = await run.begin()
        async with self._place(run, wanted, judged) as place, self._files.reading(judged.artifact_uri) as folder:
            _check(judged, place.model)
            with run.staging() if wanted.samples_per_feature else nullcontext() as samples:
                figures = await self._figures(wanted, Subject.of(judged, folder), place, samples)
                await run.publish(figures, samples)
        return {**judged.names, **figures}

    @asynccontextmanager
    async def _place(self, run: Judging, wanted: WantedEvaluation, judged: Judged) -> AsyncIterator[Here | OverDevices]:
        facts = {"model_id": judged.model_id, "layer": judged.layer, "transcoder_id": judged.transcoder_id}
        facts["dataset_id"] = wanted.dataset_id
        if wanted.devices > 1:
            async with self._splitting.open(run, wanted, judged.model_id, facts) as over_devices:
                yield over_devices
            return
        await run.waiting("the model")
        await run.unless_stopped(self._models.bring(judged.model_id))
        await run.waiting(None)
        async with self._models.lease(judged.model_id) as model:
            yield Here(run, wanted, model, facts)

    async def _figures(
        self, wanted: WantedEvaluation, subject: Subject, place: Here | OverDevices, samples: Path | None
    ) -> dict[str, Any]:
        """In the mode that was asked for; `auto` takes the next smaller one when the device's memory runs out."""
        model, modes = place.model, place.modes
        for mode in modes:
            most, size = wanted.num_batches or batches_for(mode, model.weight_bytes), wanted.batch_size
            if mode != modes[0]:  # the same text, a sequence at a time
                most, size = most * (size or model.facts.model_batch_size), 1
            try:
                batches = await self._held_out.batches(replace(wanted, batch_size=size), model, most)
                return {"mode": mode, **await place.judge(mode, subject, batches, samples)}
            except errors.Exhausted as error:
                if error.reason != "DEVICE_OOM" or mode == modes[-1]:
                    raise
        raise AssertionError("there is always a mode")


class Here:
    """With a model of this process."""

    def __init__(self, run: Judging, wanted: WantedEvaluation, model: LeasedModel, facts: dict[str, Any]) -> None:
        self.model, self.modes = model, modes_of(wanted.mode)
        self._run, self._wanted, self._facts = run, wanted, facts

    async def judge(self, mode: str, subject: Subject, batches: list[Batch], samples: Path | None) -> dict[str, Any]:
        """The figures; feature samples go into the folder."""
        wanted, model = self._wanted, self.model
        if mode != self.modes[0]:
            await model.run(give_back, model.device)
        forward = await _forward(mode, model)
        weights = await forward.run(subject.weights, forward.device)
        sampler = sampler_of(weights, wanted.samples_per_feature, forward.device)
        begin = time.monotonic()
        evaluation = Evaluation(forward.model, model.family, weights, wanted.prefix or None, sampler)
        await self._steps(forward, evaluation, batches)
        figures = figures_of(evaluation, time.monotonic() - begin)
        if sampler is not None:
            sampled = Sampled(sampler, weights, forward.model, model.family, model.tokenizer)
            await forward.run(sampled.write, samples, self._facts)
        return figures

    async def _steps(self, forward: _Forward, evaluation: Evaluation, batches: list[Batch]) -> None:
        told = time.monotonic()
        steps = steps_of(evaluation, batches)
        for done, (step, batch) in enumerate(steps, start=1):
            await self._run.checkpoint()
            await forward.run(on, forward.device, step, batch)
            if done == len(steps) or time.monotonic() - told >= LEAST_TOLD_SECONDS:
                told = time.monotonic()
                await self._run.progress(100 * done / len(steps), {"batches": len(batches), "passes_done": done})


class _Forward(NamedTuple):
    """Where the forwards run."""

    model: nn.Module
    device: str
    run: Callable[..., Awaitable[Any]]


async def _forward(mode: str, model: LeasedModel) -> _Forward:
    """The model where it is; for mode cpu, where that is a GPU, a copy in this host's memory."""
    if mode != "cpu" or model.device == "cpu":
        return _Forward(model.model, model.device, model.run)
    if bound := await model.run(device_bound, model.model):
        raise errors.Unsupported(
            f"weights in the format {bound} run on a GPU only", metadata={"device": model.device, "format": bound}
        )
    free = psutil.virtual_memory().available
    if model.weight_bytes > free:
        raise insufficient_memory(model.weight_bytes, free)
    return _Forward(await model.run(host_copy, model.model), "cpu", asyncio.to_thread)


def modes_of(mode: str) -> tuple[str, ...]:
    """The modes to try, in order."""
    return ("full", "safe", "cpu") if mode == "auto" else (mode,)


def _check(judged: Judged, model: KnownModel) -> None:
    if judged.base_digest != model.digest:
        raise errors.Conflict(
            "the transcoder was trained on another base",
            reason="LENS_INCOMPATIBLE",
            metadata={"expected": judged.base_digest, "found": model.digest},
        )
