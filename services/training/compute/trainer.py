"""The training loop over several coders of one activation stream, and its state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.training.compute.batches import Pairs, Source, ahead
from services.training.compute.coder import Coder
from services.training.compute.config import ConfigError, TrainConfig
from services.training.compute.initial import SAMPLE_ROWS, Scale
from services.training.compute.ranks import ALONE, Ranks
from services.training.compute.report import StepReport

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and plain JSON from which a training goes on."""


@dataclass(frozen=True, slots=True)
class CoderPlan:
    """What one coder learns: the source's pair it is trained on, and how."""

    pair: str
    config: TrainConfig


class Trainer:
    """Trains several coders on the same rows in the same order.

    Everything that decides the outcome is the plans, the data, and `state`: a trainer that goes on from a state does so
    bit for bit as the one that gave it (on the CPU, with the same number of threads).
    """

    def __init__(
        self,
        source: Source,
        plans: Mapping[str, CoderPlan],
        device: torch.device | str = "cpu",
        state: State | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Start coders from the data's statistics, or go on from a state.

        Args:
            source: the rows.
            plans: by coder's name; one batch size, token number and seed for all.
            device: where the coders live.
            state: what `state` of a trainer with the same plans gave, however many ranks it had.
            ranks: the processes that train together, each of them with the same arguments.

        Raises:
            ConfigError: a plan does not fit the data or the others; nothing was allocated.
            ValueError: it is a state of another training.
        """
        first = _check(source, plans)
        ranks.check(first.batch_size)
        self._source, self._device, self._seed, self._ranks = source, torch.device(device), first.seed, ranks
        self.steps, self.batch_size, self.step_count = first.steps, first.batch_size, 0
        self._pair = {name: plan.pair for name, plan in plans.items()}
        resolved = {name: plan.config.resolved(source.widths[plan.pair][1]) for name, plan in plans.items()}
        if state is None:
            self.coders = self._start(resolved)
        else:
            self.coders = coders_of(state, self._device, ranks)
            if {coder.name: coder.config for coder in self.coders} != resolved:
                raise ValueError("this state belongs to another training")
            self.step_count = state[1]["step_count"]
        self._batches: Iterator[Pairs] | None = None
        self.waited_seconds = 0.0
        """Time that steps spent waiting for their batches."""

    def step(self) -> list[StepReport]:
        """One batch for every coder, in the order of the plans.

        Raises:
            NonFiniteLoss: from the first coder it happens to, which is as it was; the step does not count.
        """
        if self._batches is None:
            start = self.step_count * self.batch_size
            self._batches = ahead(self._source.batches(self.batch_size, self._seed, start))
        begin = time.perf_counter()
        batch = self._ready(next(self._batches))
        self.waited_seconds += time.perf_counter() - begin
        reports = [coder.step(*batch[self._pair[coder.name]]) for coder in self.coders]
        self.step_count += 1
        seconds = time.perf_counter() - begin
        rate = self.batch_size * len(reports) / seconds
        return [replace(one, share=one.seconds / seconds, coder_tokens_per_second=rate) for one in reports]

    def run(self) -> Iterator[list[StepReport]]:
        """The remaining steps."""
        while self.step_count < self.steps:
            yield self.step()

    def transcoders(self) -> dict[str, Transcoder]:
        """The coders as they are now, in units of the data."""
        return {coder.name: coder.transcoder() for coder in self.coders}

    def state(self) -> State:
        """What another trainer goes on from; its tensors are our own and change with the next step."""
        tensors = {f"{coder.name}/{key}": value for coder in self.coders for key, value in coder.tensors().items()}
        coders = {coder.name: coder.facts() for coder in self.coders}
        return tensors, {"step_count": self.step_count, "coders": coders}

    def _start(self, configs: Mapping[str, TrainConfig]) -> list[Coder]:
        rows = min(self._source.rows, SAMPLE_ROWS)
        parts = list(islice(self._source.batches(self.batch_size, self._seed, 0), -(-rows // self.batch_size)))
        coders = []
        for name, config in configs.items():
            x, y = (torch.cat([part[self._pair[name]][side] for part in parts])[:rows] for side in (0, 1))
            sample = (x.to(self._device).float(), y.to(self._device).float())
            coders.append(Coder.start(name, config, *sample, self._ranks))
        return coders

    def _ready(self, batch: Pairs) -> Pairs:
        share = self._ranks.share
        return {name: (share(x).to(self._device), share(y).to(self._device)) for name, (x, y) in batch.items()}


def coders_of(state: State, device: torch.device | str = "cpu", ranks: Ranks = ALONE) -> list[Coder]:
    """The coders of a state, without any data.

    Raises:
        ValueError: a tensor is missing or has another shape than its configuration says.
    """
    tensors, facts = state
    coders = []
    for name, found in facts["coders"].items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        config = TrainConfig(**found["config"])
        scale = Scale(*found["scale"])
        coder = Coder.restored(
            name,
            config,
            scale,
            own,
            step_count=facts["step_count"],
            products=found["products"],
            device=device,
            ranks=ranks,
        )
        coders.append(coder)
    return coders


def _check(source: Source, plans: Mapping[str, CoderPlan]) -> TrainConfig:
    if not plans:
        raise ConfigError("plans", "there is no coder to train")
    for name, plan in plans.items():
        if plan.pair not in source.widths:
            raise ConfigError("plans", f"{name} is to learn {plan.pair}, which the source does not hold")
    first = next(iter(plans.values())).config
    for field in ("batch_size", "num_tokens", "seed"):
        if any(getattr(plan.config, field) != getattr(first, field) for plan in plans.values()):
            raise ConfigError(field, "has to be the same for all coders of one stream")
    if source.rows < first.batch_size:
        raise ConfigError("batch_size", f"{first.batch_size} is more than the {source.rows} rows there are")
    return first
