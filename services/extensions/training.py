"""The training job: one optimizer step at a time on a base that others use meanwhile, resumable at any of them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch

from services.extensions import errors as translated
from services.extensions.compute import checkpoint
from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.examples import Examples
from services.extensions.compute.memory import training_bytes
from services.extensions.compute.merge import KEY as COPY_KEY
from services.extensions.compute.merge import Merged, copy_to_train, merge
from services.extensions.compute.settings import Precision, Schedule, TrainSettings, default_precision
from services.extensions.compute.train import StepReport, Trainer, require_fit
from services.extensions.course import Course, Here, Teams
from services.extensions.domain import Extension, NewTraining, Sharer, TrainedExtension, Training
from services.extensions.exchanging import model_files
from services.extensions.measuring import attached, examples_for, loss, row_length
from services.extensions.ports import Base, Bases, Catalogue, Datasets, Ledger, Run, Store
from services.kit import errors
from services.residency.gang import CUDA_CONTEXT_BYTES
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import read_manifest, retrained
from services.residency.lenses.lora import KEY_PREFIX

DEFAULT_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE = 2e-4
WARMUP_SHARE = 0.05
EVALUATION_SHARE = 0.05
"""Share of the steps between two held-out losses, when early stopping needs them and the request names no number."""
PROGRESS_SHARE = 0.01
"""Share of the steps between two events; the first and the last step always tell."""


@dataclass(frozen=True, slots=True)
class _Session:
    base: Base
    key: str
    course: Course
    held_out: Examples


class TrainingJob:
    """Handles jobs of kind `extension_training`."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        bases: Bases,
        datasets: Datasets,
        catalogue: Catalogue,
        *,
        teams: Teams,
        checkpoint_seconds: float,
    ) -> None:
        """Use these ports; a state to resume from is saved every `checkpoint_seconds`."""
        self._store = store
        self._ledger = ledger
        self._bases = bases
        self._datasets = datasets
        self._catalogue = catalogue
        self._teams = teams
        self._checkpoint_seconds = checkpoint_seconds

    async def run(self, run: Run) -> dict[str, Any]:
        """Train to the end; when the job is stopped, the state is saved first.

        Returns:
            The job's result: steps, tokens, held-out losses, seconds.

        Raises:
            errors.LensmeshError: it cannot go on; the extension's weights are those it began with.
        """
        training = await run.training()
        if training.result is not None:
            return dict(training.result)
        if training.extension.job_id != run.job_id:
            raise errors.Conflict("another training of this extension has begun since")
        await run.waiting(f"the model {training.extension.model_id}")
        async with (
            self._store.reading(training.artifact_uri) as folder,
            self._bases.lease(training.extension.model_id) as base,
            attached(base, folder) as key,
        ):
            await run.waiting(None)
            examples, held_out = await self._examples(training.wanted, base)
            precision = await base.run(default_precision, base.model)
            settings = settings_of(training.wanted, len(examples), precision)
            async with self._course(run, training, (base, key), folder, (examples, settings)) as (own, own_key, course):
                session = _Session(own, own_key, course, held_out)
                result = await self._train(run, session, training, settings.steps)
                if not training.extension.freeze_base:
                    result = await self._registered(run, session, training, result)
                    await run.finish(result, None)
                else:
                    sharers = await self._sharers(training.extension, session)
                    result = replace(result, shared=await self._judged(sharers, session))
                    await run.finish(result, await base.run(_files, folder, base, key, result), sharers)
        return result.as_dict()

    async def _registered(
        self, run: Run, session: _Session, training: Training, result: TrainedExtension
    ) -> TrainedExtension:
        """The trained copy as a model of its own."""
        base, extension = session.base, training.extension
        merged = await base.run(_merged, base, session.key)
        digest = await run.publish(model_files(merged.model, base.tokenizer))
        name = f"{(await self._catalogue.model(extension.model_id)).name} {extension.task_name}"
        return replace(result, model_id=await self._catalogue.register(name, digest, run.job_id))

    async def _sharers(self, extension: Extension, session: _Session) -> Sequence[Sharer]:
        """Extensions that get the layers that were trained; none when none were."""
        trained = session.base.attached[session.key].trainable
        if all(name.startswith(KEY_PREFIX) for name in trained):
            return ()
        return await self._store.sharers(extension)

    async def _judged(self, sharers: Sequence[Sharer], session: _Session) -> dict[str, dict[str, float]]:
        """What the trained layers do to the others' held-out losses."""
        losses: dict[str, dict[str, float]] = {}
        base = session.base
        for sharer in sharers:
            if sharer.judged_by is None:
                continue
            _, held_out = await self._examples(sharer.judged_by, base)
            async with self._store.reading(sharer.extension.artifact_uri) as folder, attached(base, folder) as other:
                before, _ = await loss(base, other, held_out)
                await base.run(_take_layers, base, session.key, other)
                after, _ = await loss(base, other, held_out)
            losses[sharer.extension.id] = {"loss_before": before, "loss_after": after}
        return losses

    async def _examples(self, wanted: NewTraining, base: Base) -> tuple[Examples, Examples]:
        vocabulary, length = base.model.config.vocab_size, row_length(base, wanted.max_length)
        documents = await self._datasets.documents("dataset_id", wanted.dataset_id, base.tokenizer, vocabulary)
        if wanted.held_out_dataset_id:
            field = "held_out_dataset_id"
            judged = await self._datasets.documents(field, wanted.held_out_dataset_id, base.tokenizer, vocabulary)
        elif len(documents) < 2:
            raise errors.Invalid.of("held_out_dataset_id", "the dataset has one row; name another to judge by")
        else:
            field = "dataset_id"
            documents, judged = documents.held_out()
        return examples_for("dataset_id", base, documents, length), examples_for(field, base, judged, length)

    @asynccontextmanager
    async def _course(
        self,
        run: Run,
        training: Training,
        subject: tuple[Base, str],
        folder: Path,
        work: tuple[Examples, TrainSettings],
    ) -> AsyncIterator[tuple[Base, str, Course]]:
        """What is trained and under which key, with its bytes reserved and where the job left off."""
        (base, key), whole = subject, not training.extension.freeze_base
        async with AsyncExitStack() as stack:
            devices = training.wanted.devices or 1
            reserved = self._reserved(run, training, base, key, work, devices=devices, whole=whole)
            ranks = await stack.enter_async_context(reserved)
            async with AsyncExitStack() as reading:  # a state that somebody reads cannot be deleted
                state: Path | None = None
                if training.checkpoint_uri is not None:
                    state = await reading.enter_async_context(self._store.reading(training.checkpoint_uri))
                course: Course
                if len(ranks) > 1:
                    with translated.requests():
                        require_fit(base.model, *work)
                    team = self._teams.start(base, key, folder, work, ranks=ranks, state=state)
                    course = await stack.enter_async_context(team)
                else:
                    if whole:
                        subject = await base.run(_copied, base, folder)
                    course = Here(base, await base.run(_trainer, *subject, work, folder, state))
            yield *subject, course

    @asynccontextmanager
    async def _reserved(
        self,
        run: Run,
        training: Training,
        base: Base,
        key: str,
        work: tuple[Examples, TrainSettings],
        *,
        devices: int,
        whole: bool,
    ) -> AsyncIterator[Sequence[str]]:
        """Devices of the processes that train."""
        extension = base.attached[key]
        if whole:
            extension = replace(extension, parameters={**extension.parameters, **dict(base.model.named_parameters())})
        size = training_bytes(base.model.config, extension, *work)
        if devices > 1:  # each has a base of its own
            on_gpu = next(base.model.parameters()).device.type == "cuda"
            size += base.nbytes + (CUDA_CONTEXT_BYTES if on_gpu else 0)
        uses = (training.extension.model_id,)
        try:
            reserving = self._ledger.reserve(run.job_id, size, devices, waiting=run.waiting, uses=uses)
            yield await run.unless_stopped(reserving)
        finally:
            await self._ledger.release(run.job_id)

    async def _train(self, run: Run, session: _Session, training: Training, steps: int) -> TrainedExtension:
        started = monotonic()
        base, course = session.base, session.course
        before = training.loss_before
        if before is None:
            before, _ = await loss(base, session.key, session.held_out)
            await run.begun(before)
        await self._steps(run, session, steps, before)
        await run.finalizing()
        await course.settle()
        await course.show()
        standing = course.standing
        after, _ = await loss(base, session.key, session.held_out)
        return TrainedExtension(
            steps=standing.steps_done,
            tokens=standing.tokens_seen,
            loss_before=before,
            loss_after=after,
            seconds=monotonic() - started,
            best_step=standing.best_step,
        )

    async def _steps(self, run: Run, session: _Session, steps: int, loss_before: float) -> None:
        saved_at = monotonic()
        course = session.course
        stride = max(1, round(steps * PROGRESS_SHARE))
        while not course.standing.done:
            if run.stopping or monotonic() - saved_at >= self._checkpoint_seconds:
                await run.save(await course.state())
                saved_at = monotonic()
            await run.checkpoint()
            report = await course.step()
            judged: dict[str, float] = {}
            if course.standing.to_be_judged:
                await course.show()
                judged["held_out_loss"], _ = await loss(session.base, session.key, session.held_out)
                await course.judged(judged["held_out_loss"])
            if judged or report.step in (1, steps) or report.step % stride == 0:
                told: dict[str, Any] = figures(report, steps, loss_before) | judged
                ranks = course.standing.ranks
                await run.progress(100 * report.step / steps, told | ({"ranks": ranks} if ranks else {}))


def settings_of(wanted: NewTraining, rows: int, precision: Precision) -> TrainSettings:
    """How to train, with every default resolved.

    Args:
        wanted: the request.
        rows: examples there are; they turn epochs into steps.
        precision: what is taken when the request leaves it open.

    Raises:
        errors.Invalid: a setting is out of range, or contradicts another.
    """
    batch_size = wanted.batch_size or DEFAULT_BATCH_SIZE
    parts = wanted.gradient_accumulation_steps or 1
    steps = wanted.steps or math.ceil(wanted.epochs * rows / (batch_size * parts))
    share = max(1, round(steps * EVALUATION_SHARE)) if wanted.patience else 0
    with translated.requests():
        return TrainSettings(
            steps=steps,
            batch_size=batch_size,
            gradient_accumulation_steps=parts,
            learning_rate=wanted.learning_rate or DEFAULT_LEARNING_RATE,
            lr_schedule=cast(Schedule, wanted.lr_schedule or "cosine"),
            warmup_steps=round(steps * WARMUP_SHARE) if wanted.warmup_steps is None else wanted.warmup_steps,
            loraplus_lr_ratio=wanted.loraplus_lr_ratio or 1.0,
            weight_decay=wanted.weight_decay,
            precision=cast(Precision, wanted.precision or precision),
            gradient_checkpointing=wanted.gradient_checkpointing,
            evaluate_every=wanted.evaluate_every or share,
            patience=wanted.patience,
            seed=wanted.seed,
        )


def figures(report: StepReport, steps: int, loss_before: float) -> dict[str, Any]:
    """What progress tells, as plain JSON."""
    return {
        "step": report.step,
        "steps": steps,
        "loss": report.loss,
        "loss_before": loss_before,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "tokens_seen": report.tokens_seen,
        "tokens_per_second": report.tokens / report.seconds,
    }


@dataclass(slots=True)
class _Copy:
    """A private copy of a base, trained as a whole on the base's device thread."""

    model: Any
    tokenizer: Any
    digest: str
    directory: Path
    quantization: str
    nbytes: int
    attached: Extensions
    run: Callable[..., Any]


def _copied(base: Base, folder: Path) -> tuple[Base, str]:
    with translated.stored():
        model, extensions = copy_to_train(base.model, folder)
    facts = (base.tokenizer, base.digest, base.directory, base.quantization, base.nbytes)
    return _Copy(model, *facts, extensions, base.run), COPY_KEY


def _merged(base: Base, key: str) -> Merged:
    with translated.stored():
        return merge(base.model, base.attached, key)


def _take_layers(base: Base, source: str, target: str) -> None:
    trained = base.attached[source].parameters
    with torch.no_grad():
        for name, parameter in base.attached[target].parameters.items():
            if not name.startswith(KEY_PREFIX):
                parameter.copy_(trained[name])


def _trainer(base: Base, key: str, work: tuple[Examples, TrainSettings], folder: Path, state: Path | None) -> Trainer:
    with translated.requests():
        config = ExtensionConfig.from_dict(read_manifest(folder).config)
        trainer = Trainer(base.model, base.attached, key, *work, config=config)
    if state is not None:
        with translated.stored():
            checkpoint.load(trainer, state)
    return trainer


def _files(folder: Path, base: Base, key: str, result: TrainedExtension) -> Callable[[Path], None]:
    learnt = {name: value for name, value in result.as_dict().items() if name not in ("seconds", "shared")}
    return retrained(folder, base.attached[key], learnt)
