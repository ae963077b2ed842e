"""What operators see of trainings: throughput, how the last one does, and losses that were not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.kit import errors


class TrainingMetrics:
    """Figures of the trainings of this process; gauges are those of the step that was told last."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter("train_tokens", "Tokens that trainings have seen", registry=registry)
        self._nonfinite = Counter("train_nonfinite", "Trainings that a loss stopped", registry=registry)
        self._trained = Counter("train_coder_tokens", "Tokens times coders that saw them", registry=registry)
        self._loss = Gauge("train_loss", "Loss of the last step that was told", registry=registry)
        self._fvu = Gauge("train_fvu", "FVU of the last batch that was told", registry=registry)
        self._l0 = Gauge("train_l0", "Active latents per token of the last batch that was told", registry=registry)
        self._dead = Gauge("train_dead_ratio", "Part of the latents that are dead", registry=registry)
        self._gradient = Gauge("train_gradient_norm", "Norm of the gradient before clipping", registry=registry)
        self._stepped_at = Gauge("train_step_last_timestamp_seconds", "When a step was last told", registry=registry)

    def told(self, figures: Mapping[str, Any], tokens: int) -> None:
        """A training told its figures, `tokens` after it did so before."""
        self._tokens.inc(tokens)
        self._trained.inc(tokens * len(figures["coders"]))
        self._loss.set(figures["loss"])
        self._fvu.set(figures["fvu"])
        self._l0.set(figures["l0"])
        self._dead.set(figures["dead_fraction"])
        self._gradient.set(figures["gradient_norm"])
        self._stepped_at.set_to_current_time()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a training that a loss stops."""
        try:
            yield
        except errors.Failed as error:
            if error.reason == "NON_FINITE_LOSS":
                self._nonfinite.inc()
            raise
