"""Train a transcoder on tensors: the notebook's entrance."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.training.compute.batches import InMemory
from services.training.compute.config import TrainConfig
from services.training.compute.report import StepReport
from services.training.compute.trainer import CoderPlan, Trainer


def fit(
    x: Tensor, y: Tensor, config: TrainConfig, *, on_step: Callable[[StepReport], None] | None = None
) -> tuple[Transcoder, list[StepReport]]:
    """A transcoder that maps x to y, and the report of every step.

    Args:
        x: float32 [N, d_in], on the device that trains.
        y: float32 [N, d_out], there too.
        config: what to train.
        on_step: called with each report while the next step waits.

    Raises:
        ConfigError: (a ValueError) tensors and configuration do not fit, the field is named.
        NonFiniteLoss: the data holds values that are not finite, or the learning rate is far too high.
    """
    trainer = Trainer(InMemory({"pair": (x, y)}), {"coder": CoderPlan("pair", config)}, x.device)
    reports = []
    for (report,) in trainer.run():
        reports.append(report)
        if on_step is not None:
            on_step(report)
    return trainer.transcoders()["coder"], reports
