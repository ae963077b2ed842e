"""What every call has: who asks, what makes it repeatable, and which page of a list it wants."""

from __future__ import annotations

from typing import Any

from services.kit import paging
from services.kit.auth import current_caller
from services.kit.errors import Invalid
from services.registry.domain import Caller
from services.registry.listing import Listed, Page


def caller() -> Caller:
    """Who asks.

    Raises:
        Unauthenticated: outside of a call.
    """
    found = current_caller()
    claim = found.claims.get("loads_per_hour")
    return Caller(
        subject=found.subject,
        internal=found.internal,
        admin=found.internal or "model:admin" in found.scopes,
        loads_per_hour=claim if isinstance(claim, int) and not isinstance(claim, bool) else None,
    )


def page(request: Any) -> Page:
    """Which part of a list is wanted.

    Raises:
        Invalid: a page_token that no list gave, or one together with an offset.
    """
    limit = request.limit or paging.DEFAULT_LIMIT
    if not request.page_token:
        return Page(limit, request.offset, None)
    if request.offset:
        raise Invalid.of("offset", "may not be given together with page_token")
    created_at, row_id = paging.after(request.page_token)
    return Page(limit, 0, None if created_at is None or row_id is None else (created_at, row_id))


def page_fields(listed: Listed) -> dict[str, Any]:
    """The fields that every page has."""
    return {
        "total": listed.total,
        "limit": listed.page.limit,
        "offset": listed.page.offset,
        "next_page_token": "" if listed.next is None else paging.token_after(*listed.next),
    }
