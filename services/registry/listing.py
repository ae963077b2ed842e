"""Which part of a list is wanted, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list."""

    limit: int
    offset: int
    after: tuple[datetime, str] | None
    """created_at and id of the last row of the page before."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of rows."""

    rows: list[Any]
    total: int
    page: Page

    @property
    def next(self) -> tuple[datetime, str] | None:
        """Where the next page starts; None at the end."""
        if len(self.rows) < self.page.limit:
            return None
        return (self.rows[-1].created_at, self.rows[-1].id)
