"""The learning rate of every step."""

from __future__ import annotations

import math

from services.training.compute.config import TrainConfig

DECAYING_PART = 0.2
"""The linear schedule falls over this last part of the steps."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step`, counted from 0, of a resolved configuration; never 0 before the last step is done."""
    assert config.learning_rate is not None, "the configuration is resolved before it is trained"
    steps = config.steps
    factor = min(1.0, (step + 1) / max(1.0, config.warmup_fraction * steps))
    if config.lr_schedule == "linear":
        factor *= min(1.0, (steps - step) / max(1.0, DECAYING_PART * steps))
    elif config.lr_schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return config.learning_rate * factor
