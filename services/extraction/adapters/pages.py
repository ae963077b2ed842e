"""Keyset paging over (created_at, id), newest first."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from services.extraction.domain import Filter, Page
from services.kit import errors


def after(token: str) -> tuple[datetime | None, str | None]:
    """(created_at, id) of the last row before the page that a token names.

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


def page(rows: Sequence[asyncpg.Record], total: int, wanted: Filter, build: Callable[[asyncpg.Record], Any]) -> Page:
    """A page of rows that were asked for with `limit + 1`."""
    shown = rows[: wanted.limit]
    token = ""
    if len(rows) > wanted.limit:
        last = [shown[-1]["created_at"].isoformat(), shown[-1]["id"]]
        token = base64.urlsafe_b64encode(json.dumps(last).encode()).decode()
    return Page(tuple(build(row) for row in shown), total, wanted.limit, wanted.offset, token)
