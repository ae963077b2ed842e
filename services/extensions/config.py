"""Settings of the extension service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.kit.config import Settings


class ExtensionSettings(Settings):
    """What the extension service reads from `LENSMESH_*` beside the shared settings."""

    extension_checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds of training between two states to resume from; a crash loses at most that much."""
    max_concurrent_extension_trainings: Annotated[int, Field(ge=1)] = 4
    """Extension trainings that run in the whole mesh at the same time; further ones wait in the queue."""
