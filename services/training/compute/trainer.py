"""The training loop over several coders of one activation stream, and its state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.training.compute.batches import Order, Source
from services.training.compute.coder import Coder
from services.training.compute.config import ConfigError, TrainConfig
from services.training.compute.initial import SAMPLE_ROWS
from services.training.compute.report import StepReport


class Trainer:
    """Trains one coder per stream of `source`, all on the same rows in the same order.

    Everything that decides the outcome is the configuration, the data, `state` and the step count: a trainer that
    restores a state goes on bit for bit as the one that gave it (on the CPU, with the same number of threads).
    """

    def __init__(
        self, source: Source, configs: Mapping[str, TrainConfig], device: torch.device | str = "cpu", run: int = 1
    ) -> None:
        """Start coders from the data's statistics.

        Args:
            source: the rows.
            configs: by coder; one batch size, token number and seed for all.
            device: where the coders live.
            run: neighbouring rows that stay together when the order is shuffled.

        Raises:
            ConfigError: a configuration does not fit the data or the others.
        """
        if configs.keys() != source.coders.keys():
            raise ConfigError("configs", f"for {', '.join(sorted(configs))}; the source has {', '.join(source.coders)}")
        for field in ("batch_size", "num_tokens", "seed"):
            if len({getattr(config, field) for config in configs.values()}) != 1:
                raise ConfigError(field, "has to be the same for all coders of one stream")
        self._source, self._device = source, torch.device(device)
        first = next(iter(configs.values()))
        self._order = Order(source.rows, first.batch_size, first.seed, run)
        self.steps, self.batch_size, self.step_count = first.steps, first.batch_size, 0
        sample = source.gather(self._sample_rows())
        self.coders = [
            Coder.start(name, config.resolved(source.coders[name][1]), *(self._ready(t).float() for t in sample[name]))
            for name, config in configs.items()
        ]
        self.waited_seconds = 0.0

    def step(self) -> list[StepReport]:
        """One batch for every coder.

        Raises:
            NonFiniteLoss: from the first coder it happens to; the step count is not advanced.
        """
        begin = time.perf_counter()
        batch = self._source.gather(self._order.batch(self.step_count))
        self.waited_seconds += time.perf_counter() - begin
        reports = []
        for coder in self.coders:
            x, y = batch[coder.name]
            reports.append(coder.step(self._ready(x), self._ready(y)))
        self.step_count += 1
        return reports

    def run(self) -> Iterator[list[StepReport]]:
        """The remaining steps."""
        while self.step_count < self.steps:
            yield self.step()

    def transcoders(self, info: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Transcoder]:
        """The coders as they are now, in units of the data; `info` by coder travels with them."""
        return {coder.name: coder.transcoder(dict((info or {}).get(coder.name, {}))) for coder in self.coders}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON from which `restore` goes on; the tensors are live until the next step."""
        tensors = {f"{coder.name}/{key}": value for coder in self.coders for key, value in coder.tensors().items()}
        scales = {coder.name: [coder.scale.source, coder.scale.target] for coder in self.coders}
        return tensors, {"step_count": self.step_count, "scales": scales}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is a state of other coders; nothing was changed.
        """
        scales = {coder.name: [coder.scale.source, coder.scale.target] for coder in self.coders}
        if facts["scales"] != scales:
            raise ValueError("scales: this state was trained on other data")
        for coder in self.coders:
            own = {
                key.removeprefix(f"{coder.name}/"): t for key, t in tensors.items() if key.startswith(f"{coder.name}/")
            }
            coder.restore(own, facts["step_count"])
        self.step_count = facts["step_count"]

    def _sample_rows(self) -> Tensor:
        rows = min(self._source.rows, SAMPLE_ROWS)
        batches = -(-rows // self.batch_size)
        return torch.cat([self._order.batch(step) for step in range(batches)])[:rows]

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
