"""Keyset paging over (created_at, id), newest first: tokens that name the last row of a page."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from services.kit import errors


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
    last = rows[limit - 1]
    text = json.dumps([last["created_at"].isoformat(), last["id"]])
    return rows[:limit], base64.urlsafe_b64encode(text.encode()).decode()
