"""Settings of training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.kit.config import Settings


class TrainingSettings(Settings):
    """Limits of trainings, and when they keep their state."""

    extraction_address: str = ""
    """gRPC address of the extraction service, host:port; this process itself where it runs there."""
    max_concurrent_trainings: Annotated[int, Field(ge=1)] = 2
    """Trainings that run at the same time in the whole mesh; the others wait as queued jobs."""
    training_checkpoint_tokens: Annotated[int, Field(ge=1)] = 20_000_000
    """A training writes a checkpoint after so many tokens."""
    training_checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A training writes a checkpoint after so many seconds."""
    training_checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints of a training that are kept."""
