"""The training job: what a worker does with a claimed training, from its cache to the published transcoders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.kit.jobs import Interrupted, Paused, StaleLease
from services.training.compute.config import TrainConfig
from services.training.dialogue import Finished, Progress, Start, Written
from services.training.domain import (
    ARTIFACT_KIND,
    CHECKPOINT_KIND,
    STREAM_KIND,
    Cache,
    CoderSpec,
    NewTranscoder,
    Plan,
    Task,
)
from services.training.figures import figures_of
from services.training.job_ports import Child, Children, Extractions, Files, Ledger, Run, SplitModel, Splits
from services.training.requests import check_cache, check_files, memory_bytes, settled


class TrainingJob:
    """Runs claimed trainings, each in a process of its own."""

    def __init__(
        self,
        extractions: Extractions,
        splits: Splits,
        ledger: Ledger,
        files: Files,
        children: Children,
        *,
        device: str,
        threads: int,
        checkpoint_tokens: int,
        checkpoint_seconds: float,
    ) -> None:
        """Use these.

        Args:
            extractions: where caches come from.
            splits: where models come from that are split over a training's devices.
            ledger: the device's bytes.
            files: caches and checkpoints.
            children: starts processes.
            device: where to train.
            threads: CPU threads of a training that has not been started before.
            checkpoint_tokens: a checkpoint is written after so many tokens,
            checkpoint_seconds: or after so much time.
        """
        self._extractions, self._splits = extractions, splits
        self._ledger, self._files, self._children = ledger, files, children
        self._device, self._threads = device, threads
        self._checkpoint_tokens, self._checkpoint_seconds = checkpoint_tokens, checkpoint_seconds

    async def run(self, run: Run) -> dict[str, Any]:
        """Do what the claim says; returns the job's result.

        Raises:
            errors.Failed: `NON_FINITE_LOSS`, `CHECKSUM_MISMATCH`; `TRAINING_FAILED` (transient): the process died.
            errors.Exhausted: `INSUFFICIENT_MEMORY`, `DEVICE_OOM`.
            errors.Unsupported: the machine has fewer devices than the training is to use.
            errors.Invalid: the data does not fit the plan.
        """
        task = await run.begin()
        if task.transcoder_ids:  # published by an attempt that ended before the job's row said so
            return {"transcoder_ids": list(task.transcoder_ids)}
        async with AsyncExitStack() as stack:
            state = ""
            if task.checkpoint is not None:
                state = str(await stack.enter_async_context(self._files.reading(task.checkpoint.artifact_uri)))
            if task.finalize:
                start = Start(task.plan.as_json(), "cpu", state=state)
                child = await stack.enter_async_context(self._children.start(start))
                finished = await child.next()
                assert isinstance(finished, Finished), "a process without a cache makes no step"
                return await self._publish(run, task, task.plan, child, finished)
            cache, where, model = await stack.enter_async_context(self._data(run, task))
            plan = settled(task.plan, cache, self._threads)
            await run.settle(plan, cache.id, task.checkpoint.step if task.checkpoint else 0)
            bytes_each = memory_bytes(plan, cache.widths, self._device)
            if model is not None:
                split, bytes_each = await asyncio.to_thread(model.over, plan.devices, bytes_each)
                where = {"split": asdict(split)}
            stack.push_async_callback(self._ledger.release, task.job_id)
            uses = (task.model_id,) if plan.live and not plan.split else ()
            reserving = self._ledger.reserve(task.job_id, bytes_each, plan.devices, waiting=run.waiting, uses=uses)
            devices = await run.unless_stopped(reserving)
            ranks = [",".join(dict.fromkeys(devices))] if plan.split else devices
            threads = max(1, plan.threads // plan.ranks)
            start = Start(plan.as_json(), self._device, ranks, threads, state=state, **where)
            child = await stack.enter_async_context(self._children.start(start))
            finished = await self._follow(run, plan, child, task.checkpoint.tokens_seen if task.checkpoint else 0)
            return await self._publish(run, task, plan, child, finished)

    @asynccontextmanager
    async def _data(self, run: Run, task: Task) -> AsyncIterator[tuple[Cache, dict[str, Any], SplitModel | None]]:
        """What the rows are, where the process finds them (a field of `Start`), and a model that is yet to be split."""
        if task.plan.live:
            assert task.dataset_id is not None, "a live stream has a dataset"
            what = (task.model_id, task.dataset_id, task.plan)
            if task.plan.split:
                with run.staging(STREAM_KIND) as folder:
                    model = await run.unless_stopped(self._splits.open(*what, folder))
                    check_cache(task.plan, model.cache)
                    yield model.cache, {}, model
                return
            stream = await run.unless_stopped(self._extractions.streamed(*what))
            check_cache(task.plan, stream)
            with run.staging(STREAM_KIND) as folder:
                yield stream, {"live": asdict(self._extractions.live(*what, folder))}, None
            return
        cache = await self._cache(run, task)
        async with self._files.reading(cache.storage_uri) as folder:
            await asyncio.to_thread(check_files, task.plan, folder)
            yield cache, {"cache": str(folder)}, None

    async def _cache(self, run: Run, task: Task) -> Cache:
        cache_id = task.cache_id
        if cache_id is None:
            assert task.dataset_id is not None, "a training has a cache or a dataset"
            extraction_id = await self._extractions.start(task.model_id, task.dataset_id, task.plan, task.job_id)
            await run.waiting(f"extraction {extraction_id}")
            cache_id = await run.unless_stopped(self._extractions.finished(extraction_id))
            await run.waiting(None)
        cache = await self._extractions.open(cache_id)
        check_cache(task.plan, cache)
        return cache

    async def _follow(self, run: Run, plan: Plan, child: Child, saved_tokens: int) -> Finished:
        """Tell the progress and keep checkpoints until no step is left."""
        saved_at = time.monotonic()
        while True:
            try:
                message = await run.unless_stopped(child.next())
            except StaleLease:
                raise
            except Interrupted as reason:
                if not await self._save(run, child) and isinstance(reason, Paused):
                    continue  # nothing is left to pause
                raise
            if isinstance(message, Finished):
                return message
            assert isinstance(message, Progress), "answers are read where they are asked for"
            await run.progress(100 * message.tokens_seen / _tokens(plan), figures_of(message, plan))
            due = message.tokens_seen - saved_tokens >= self._checkpoint_tokens
            if due or time.monotonic() - saved_at >= self._checkpoint_seconds:
                await self._save(run, child)
                saved_at, saved_tokens = time.monotonic(), message.tokens_seen

    async def _save(self, run: Run, child: Child) -> bool:
        """Whether there is a new checkpoint; there is none once the last step is done."""
        with run.staging(CHECKPOINT_KIND) as folder:
            saved = await child.save(folder)
            if saved is not None:
                await run.checkpointed(folder, saved)
        return saved is not None

    async def _publish(self, run: Run, task: Task, plan: Plan, child: Child, finished: Finished) -> dict[str, Any]:
        await run.finalizing()
        with run.staging(ARTIFACT_KIND) as root:
            folders = {coder.name: root / coder.name for coder in plan.coders}
            infos = {coder.name: _info(coder, task, plan, finished) for coder in plan.coders}
            written = await child.write(folders, infos)
            made: list[tuple[NewTranscoder, Path]] = [
                (_transcoder(coder, task, plan, finished, written), folders[coder.name]) for coder in plan.coders
            ]
            return {"transcoder_ids": await run.publish(made)}


def _tokens(plan: Plan) -> int:
    config = TrainConfig(**plan.coders[0].config)
    return config.steps * config.batch_size


def _info(coder: CoderSpec, task: Task, plan: Plan, finished: Finished) -> dict[str, Any]:
    """What travels with the weights; nothing that differs between two runs of the same training."""
    return {
        "model": task.model_id,
        "base_digest": plan.base_digest,
        "layer": coder.layer,
        **coder.hook_points,
        "tokens_seen": finished.tokens_seen,
        "train_fvu": finished.train_fvu[coder.name],
        "config": dict(coder.config),
    }


def _transcoder(coder: CoderSpec, task: Task, plan: Plan, finished: Finished, written: Written) -> NewTranscoder:
    d_in, d_out = written.widths[coder.name]
    config = TrainConfig(**coder.config)
    return NewTranscoder(
        coder=coder.name,
        name=f"{task.model_id} layer {coder.layer}",
        model_id=task.model_id,
        layer=coder.layer,
        source_hook_point=coder.source_hook_point,
        target_hook_point=coder.target,
        d_in=d_in,
        d_out=d_out,
        dict_size=config.dict_size,
        group_sizes=config.groups,
        top_k=config.shape.top_k,
        activation=config.activation,
        base_digest=plan.base_digest,
        tokens_seen=finished.tokens_seen,
        train_fvu=finished.train_fvu[coder.name],
    )
