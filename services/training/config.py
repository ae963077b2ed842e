"""Settings of training."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from services.kit.config import Settings
from services.training.domain import Retention


class TrainingSettings(Settings):
    """Limits of trainings, and when they keep their state."""

    extraction_address: str = ""
    """gRPC address of the extraction service, host:port; this process itself where it runs there."""
    max_concurrent_trainings: Annotated[int, Field(ge=1)] = 2
    """Trainings that run at the same time in the whole mesh; the others wait as queued jobs."""
    training_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a training; 0: OMP_NUM_THREADS, else as many as there are cores."""
    training_checkpoint_tokens: Annotated[int, Field(ge=1)] = 20_000_000
    """A training writes a checkpoint after so many tokens."""
    training_checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A training writes a checkpoint after so many seconds."""
    training_checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints of a training that are kept, where its request does not say."""
    training_best_checkpoints_kept: Annotated[int, Field(ge=0)] = 1
    """Checkpoints of the lowest FVU that are kept besides, where its request does not say."""

    @property
    def training_retention(self) -> Retention:
        """Which checkpoints are kept where a request does not say."""
        return Retention(self.training_checkpoints_kept, self.training_best_checkpoints_kept)

    @property
    def threads_of_each(self) -> int:
        """CPU threads of a training: all, since threads that sleep while they wait do not harm a second training."""
        return self.training_threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
