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
        self._loss = Gauge("train_loss", "Loss of the last step that was told", registry=registry)
        self._fvu = Gauge("train_fvu", "FVU of the last batch that was told", registry=registry)
        self._stepped_at = Gauge("train_step_last_timestamp_seconds", "When a step was last told", registry=registry)

    def told(self, figures: Mapping[str, Any], tokens: int) -> None:
        """A training told its figures, `tokens` after it did so before."""
        self._tokens.inc(tokens)
        self._loss.set(figures["loss"])
        self._fvu.set(figures["fvu"])
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
