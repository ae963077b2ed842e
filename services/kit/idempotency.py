"""Requests that may be sent twice: the same `request_id` and body get the first answer, and one resource (AIP-155)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
from blake3 import blake3

from services.kit import errors
from services.kit.auth import current_caller
from services.kit.database import load_queries
from services.kit.requests import RequestKey

RETENTION = timedelta(hours=24)

_QUERIES = load_queries(__file__, "idempotency.sql")


@dataclass(slots=True)
class Request:
    """A request in the middle of its transaction."""

    answer: dict[str, Any] | None = None
    """The first answer when this is a repetition; else None until the caller sets what repetitions shall get."""


def request_key(method: str, request: Any) -> RequestKey:
    """The key of the call that is served now.

    Args:
        method: full name of the rpc.
        request: its message.
    """
    body = type(request)()
    body.CopyFrom(request)
    body.ClearField("request_id")
    digest = blake3(body.SerializeToString(deterministic=True)).digest()
    return RequestKey(current_caller().subject, method, request.request_id, digest)


@asynccontextmanager
async def idempotent(conn: asyncpg.Connection, asked: RequestKey) -> AsyncIterator[Request]:
    """Do the work of the block once per caller, method and request id.

    The record is written in the transaction of the work itself: after a crash there is either both or neither. When
    `answer` is set on entry the work was done before, and the block returns it instead of doing it again.

        async with database.transaction() as conn, idempotent(conn, …) as request:
            if request.answer is None:
                request.answer = {"id": await create(conn, …)}
        return request.answer

    Args:
        conn: connection in the transaction of the work.
        asked: see `request_key`; without a request_id nothing is remembered.

    Raises:
        errors.Conflict: `REQUEST_ID_REUSED`: the id came before with another body.
    """
    assert conn.is_in_transaction(), "a request is remembered in the transaction of its work"
    request = Request()
    if not asked.request_id:
        yield request
        return
    key = (asked.caller, asked.method, asked.request_id)
    if await conn.fetchval(_QUERIES["claim"], *key, asked.digest) is None:
        found = await conn.fetchrow(_QUERIES["find"], *key)
        if found["digest"] != asked.digest:
            raise errors.Conflict(
                "This request_id was used before with another request",
                reason="REQUEST_ID_REUSED",
                metadata={"request_id": asked.request_id},
            )
        request.answer = found["answer"]
        yield request
        return
    yield request
    assert request.answer is not None, "the block sets the answer that repetitions get"
    await conn.execute(_QUERIES["answer"], *key, request.answer)


async def purge(conn: asyncpg.Connection, retention: timedelta = RETENTION) -> int:
    """Forget requests older than `retention`; returns how many."""
    return int((await conn.execute(_QUERIES["purge"], retention)).split()[-1])
