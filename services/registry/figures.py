"""What metrics show of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Counted:
    """Figures for metrics."""

    models: Mapping[str, int] = field(default_factory=dict)
    """Models by status."""
    pinned: int = 0
    lru_age_seconds: float = 0.0
    """Seconds since the least recently used resident model was used."""
    lenses: int = 0
    """Lenses on devices."""
    saved_bytes: int = 0
    """What sharing bases saves against one base per lens."""
