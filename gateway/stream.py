"""Server streams over HTTP: SSE, newline-delimited JSON, or plain bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.encode import dumps, encode
from gateway.errors import failure
from gateway.frames import error_frame, frame, wants_sse
from gateway.reply import byte_range
from gateway.routes import Route
from services.kit.errors import DeadlineExceeded, LensmeshError

TOTAL_KEY = "x-total-size"
"""Initial metadata of a byte stream: size of the whole, without which `Range` is ignored."""
_ENTITY_HEADERS = ("etag", "content-disposition")
OPEN_SECONDS = 5.0
"""How long the reply waits for the first message; a failure until then has its own HTTP status."""


class Feed:
    """The messages of one call; the first is read ahead, so that an early failure becomes an HTTP error."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._ended = False
        self._first: asyncio.Future[Message] | None = None

    def end(self) -> None:
        """Let the reader see the end of the stream now."""
        self._ended = True
        self.call.cancel()

    async def open(self, seconds: float) -> bool:
        """Wait for the first message, at most `seconds`; whether it came.

        Raises:
            grpc.aio.AioRpcError: the call failed before it.
        """
        self._first = asyncio.ensure_future(self._read())
        done, _ = await asyncio.wait({self._first}, timeout=seconds)
        if done:
            self._first.result()
        return bool(done)

    async def first(self) -> Message | None:
        """The first message without taking it, None when the stream was empty."""
        assert self._first is not None, "open() comes first"
        message = await self._first
        return None if message is grpc.aio.EOF else message

    async def _read(self) -> Any:
        try:
            return await self.call.read()
        except asyncio.CancelledError:
            if self._ended:
                return grpc.aio.EOF
            raise

    async def messages(self) -> AsyncIterator[Message]:
        """All messages."""
        assert self._first is not None, "open() comes first"
        message = await self._first
        while message is not grpc.aio.EOF:
            yield message
            message = await self._read()


async def events(request: Request, feed: Feed, route: Route, heartbeat: float, stall: float) -> Response:
    """SSE or NDJSON, whichever the client asked for."""
    await feed.open(OPEN_SECONDS)
    if wants_sse(request.headers, route.method.descriptor.output_type):
        return EventSourceResponse(_sse(feed), ping=heartbeat, send_timeout=stall, sep="\n")
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_ndjson(feed), headers=headers, media_type="application/x-ndjson")


async def raw(request: Request, feed: Feed, whole: Callable[[], Feed], seconds: float) -> Response:
    """Bytes of a `google.api.HttpBody` stream, all of them or the wanted range.

    Args:
        request: its `Range` has been put into the call's `offset` and `length`.
        feed: the started call.
        whole: starts the call again without a range, for a service that does not tell the size of the whole.
        seconds: how long the first bytes may take.

    Raises:
        LensmeshError: RANGE_NOT_SATISFIABLE.
        DeadlineExceeded: no byte came in time.
    """
    await _open_bytes(feed, seconds)
    metadata = dict(await feed.call.initial_metadata() or ())
    wanted, total = byte_range(request.headers), metadata.get(TOTAL_KEY, "")
    if not total.isdecimal():
        if wanted is not None:
            feed.end()
            feed = whole()
            await _open_bytes(feed, seconds)
        return await _bytes(feed, 200, {})
    headers = {"accept-ranges": "bytes"} | {name: metadata[name] for name in _ENTITY_HEADERS if name in metadata}
    size = int(total)
    if wanted is None:
        return await _bytes(feed, 200, headers | {"content-length": total})
    first, last = wanted[0], min(wanted[1] if wanted[1] is not None else size - 1, size - 1)
    if first >= size:
        feed.end()
        raise LensmeshError(f"the content has {size} bytes", reason="RANGE_NOT_SATISFIABLE", metadata={"size": size})
    headers |= {"content-range": f"bytes {first}-{last}/{size}", "content-length": str(last - first + 1)}
    return await _bytes(feed, 206, headers)


async def _open_bytes(feed: Feed, seconds: float) -> None:
    if not await feed.open(seconds):
        raise DeadlineExceeded


async def _bytes(feed: Feed, status: int, headers: dict[str, str]) -> Response:
    first: Any = await feed.first()
    media_type = first.content_type if first is not None and first.content_type else "application/octet-stream"
    headers["x-content-type-options"] = "nosniff"
    return StreamingResponse(_chunks(feed), status, headers, media_type)


async def _chunks(feed: Feed) -> AsyncIterator[bytes]:
    async for message in feed.messages():
        yield message.data


async def _sse(feed: Feed) -> AsyncIterator[ServerSentEvent]:
    try:
        async for message in feed.messages():
            made = frame(message)
            if not made.heartbeat:
                yield ServerSentEvent(dumps(made.data).decode(), event=made.event, id=made.id, sep="\n")
    except grpc.aio.AioRpcError as error:
        last = error_frame(failure(error))
        yield ServerSentEvent(dumps(last.data).decode(), event=last.event, sep="\n")


async def _ndjson(feed: Feed) -> AsyncIterator[bytes]:
    try:
        async for message in feed.messages():
            yield dumps({"result": encode(message)}) + b"\n"
    except grpc.aio.AioRpcError as error:
        yield dumps(failure(error).body()) + b"\n"
