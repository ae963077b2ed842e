"""What users switch to after what: see `ports.HabitRows`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """What a user switched to."""

    group_id: str
    lens_id: str
    """Empty for the base alone."""
