"""Replies: JSON with optional gzip, bytes with `Range`, errors in their envelope."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from gateway.encode import dumps
from gateway.errors import Failure

GZIP_FROM = 1024
"""Replies of fewer bytes are not worth compressing."""
_GZIP_LEVEL = 5
_IN_THREAD_FROM = 64 * 1024
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})?")
_GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?:;\s*q=(?P<q>[0-9.]+)\s*)?(?:,|$)", re.IGNORECASE)


async def json_reply(
    headers: Headers,
    value: Any,
    status: int = 200,
    extra: Mapping[str, str] | None = None,
) -> Response:
    """`value` as JSON, compressed when it is large and the client asked for it."""
    return await text_reply(headers, dumps(value), "application/json", status, extra)


async def text_reply(
    headers: Headers, content: bytes, media_type: str, status: int = 200, extra: Mapping[str, str] | None = None
) -> Response:
    """UTF-8 text of any type, compressed when it is large and the client asked for it."""
    made = {"cache-control": "no-store", "x-content-type-options": "nosniff", **(extra or {})}
    if len(content) > GZIP_FROM:
        made["vary"] = "accept-encoding"
        if _takes_gzip(headers):
            content = await _compressed(content)
            made["content-encoding"] = "gzip"
    return Response(content, status, made, media_type)


async def error_reply(headers: Headers, failure: Failure) -> Response:
    """The error envelope with the headers of its status."""
    return await json_reply(headers, failure.body(), failure.status, failure.headers)


def byte_range(headers: Headers) -> tuple[int, int | None] | None:
    """(first, last or None) of a `Range` header with one range from a given byte; other forms may be ignored."""
    match = _RANGE.fullmatch(headers.get("range", "").strip())
    if match is None:
        return None
    first, last = int(match[1]), int(match[2]) if match[2] else None
    return None if last is not None and last < first else (first, last)


def _takes_gzip(headers: Headers) -> bool:
    match = _GZIP.search(headers.get("accept-encoding", ""))
    return match is not None and match["q"] not in ("0", "0.0", "0.00", "0.000")


async def _compressed(content: bytes) -> bytes:
    if len(content) < _IN_THREAD_FROM:
        return gzip.compress(content, _GZIP_LEVEL, mtime=0)
    return await asyncio.to_thread(gzip.compress, content, _GZIP_LEVEL, mtime=0)
