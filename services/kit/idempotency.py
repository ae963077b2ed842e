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
from services.kit.database import load_queries

RETENTION = timedelta(hours=24)

_QUERIES = load_queries(__file__, "idempotency.sql")


@dataclass(slots=True)
class Request:
    """A request in the middle of its transaction."""

    answer: dict[str, Any] | None = None
    """The first answer when this is a repetition; else None until the caller sets what repetitions shall get."""


def digest_of(body: bytes) -> bytes:
    """Digest of a request's canonical bytes: a message serialised deterministically, without its request_id."""
    return blake3(body).digest()


@asynccontextmanager
async def idempotent(
    conn: asyncpg.Connection, *, caller: str, method: str, request_id: str, request_digest: bytes
) -> AsyncIterator[Request]:
    """Do the work of the block once per caller, method and request id.

    The record is written in the transaction of the work itself: after a crash there is either both or neither. When
    `answer` is set on entry the work was done before, and the block returns it instead of doing it again.

        async with database.transaction() as conn, idempotent(conn, …) as request:
            if request.answer is None:
                request.answer = {"id": await create(conn, …)}
        return request.answer

    Args:
        conn: connection in the transaction of the work.
        caller: subject of the caller.
        method: full name of the rpc.
        request_id: chosen by the client; without one (empty) nothing is remembered.
        request_digest: see `digest_of`.

    Raises:
        errors.Conflict: `REQUEST_ID_REUSED`: the id came before with another body.
    """
    assert conn.is_in_transaction(), "a request is remembered in the transaction of its work"
    request = Request()
    if not request_id:
        yield request
        return
    key = (caller, method, request_id)
    if await conn.fetchval(_QUERIES["claim"], *key, request_digest) is None:
        found = await conn.fetchrow(_QUERIES["find"], *key)
        if found["digest"] != request_digest:
            raise errors.Conflict(
                "This request_id was used before with another request",
                reason="REQUEST_ID_REUSED",
                metadata={"request_id": request_id},
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
