"""Which part of a list is wanted, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
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

    rows: Sequence[Any]
    total: int
    page: Page
    next: tuple[datetime, str] | None
    """Where the next page starts; None at the end."""

    @classmethod
    def of(cls, rows: Sequence[Any], total: int, page: Page) -> Listed:
        """The page of rows of which one more was read than it holds, if there is one."""
        shown = rows[: page.limit]
        last = shown[-1] if len(rows) > page.limit else None
        return cls(shown, total, page, None if last is None else (last.created_at, last.id))
