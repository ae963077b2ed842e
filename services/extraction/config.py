"""Settings of extraction; spec/003's figures are the defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.kit.config import Bytes, Settings


class ExtractionSettings(Settings):
    """Limits of extractions and of their caches."""

    max_concurrent_extractions: Annotated[int, Field(ge=1)] = 5
    """Extractions that run at the same time in the whole mesh; the others wait as queued jobs."""
    extraction_queue_limit: Annotated[int, Field(ge=1)] = 100
    """Extractions that may wait; one more is refused."""
    activation_cache_limit: Bytes = 100_000_000_000
    """Bytes of activation caches on one host; beyond it the least recently used ones are deleted."""
    activation_cache_reuse_hours: Annotated[float, Field(ge=0)] = 24.0
    """Hours for which a cache answers the same request again."""
    activation_cache_unused_days: Annotated[float, Field(gt=0)] = 30.0
    """Days without a reader after which a cache is deleted."""
    max_activation_streams: Annotated[int, Field(ge=1)] = 4
    """Live streams of activations that one process feeds at the same time, each with a buffer of its own."""
