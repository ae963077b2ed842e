"""A training that a loss stops is counted; another failure is not."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from services.kit import errors
from services.training.adapters.metrics import TrainingMetrics


@pytest.mark.parametrize(("reason", "counted"), [("NON_FINITE_LOSS", 1.0), ("CHECKSUM_MISMATCH", 0.0)])
def test_only_losses_count(reason: str, counted: float) -> None:
    registry = CollectorRegistry()
    metrics = TrainingMetrics(registry)
    with pytest.raises(errors.Failed), metrics.counted():
        raise errors.Failed("stopped", reason=reason)
    assert registry.get_sample_value("train_nonfinite_total") == counted
