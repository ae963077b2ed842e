"""Keyset paging over (created_at, id), newest first: tokens that name the last row of a page."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.kit import errors

DEFAULT_LIMIT = 50


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, newest first."""

    items: tuple[Any, ...]
    total: int
    limit: int
    offset: int
    next_page_token: str

    def fields(self) -> dict[str, Any]:
        """What every list's answer has beside its items."""
        return {
            "total": self.total,
            "limit": self.limit,
            "offset": self.offset,
            "next_page_token": self.next_page_token,
        }


def asked(request: Any) -> dict[str, Any]:
    """What every list's request has beside its filters."""
    return {"limit": request.limit or DEFAULT_LIMIT, "offset": request.offset, "page_token": request.page_token}


def after(token: str) -> tuple[datetime | None, str | None]:
    """(created_at, id) of the last row before the page that a token names; (None, None) without a token.

    Raises:
        errors.Invalid: it is no token of ours.
    """
    if not token:
        return None, None
    try:
        created_at, row_id = json.loads(base64.urlsafe_b64decode(token.encode()))
        return datetime.fromisoformat(created_at), str(row_id)
    except (ValueError, TypeError, binascii.Error) as error:
        raise errors.Invalid.of("page_token", "is not a token of an earlier answer") from error


def cut(rows: Sequence[Mapping[str, Any]], limit: int) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The rows to show of those that were asked for with `limit + 1`, and the token of the next page, "" at the end."""
    if len(rows) <= limit:
        return rows, ""
    return rows[:limit], token_after(rows[limit - 1]["created_at"], rows[limit - 1]["id"])


def token_after(created_at: datetime, row_id: str) -> str:
    """The token of the page after a row."""
    return base64.urlsafe_b64encode(json.dumps([created_at.isoformat(), row_id]).encode()).decode()
