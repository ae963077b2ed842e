"""The WebSocket of events: one message from the client (token, topics), then frames until either side ends."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import body
from gateway.backends import Backends
from gateway.decode import decode
from gateway.encode import dumps
from gateway.errors import failure
from gateway.exchange import SCOPE_KEY, Exchange, call_metadata
from gateway.frames import frame
from gateway.metrics import GatewayMetrics
from gateway.routes import Route
from gateway.stream import Feed
from services.kit.auth import TokenVerifier
from services.kit.errors import DeadlineExceeded, Invalid, LensmeshError, Unauthenticated
from services.kit.logs import get_logger

FIRST_MESSAGE_SECONDS = 10.0
"""How long a client may take to send its first message."""
CLOSE_SECONDS = 5.0
"""How long a client that takes no bytes may keep us from closing."""
ENDED, REFUSED, FAILED, TRY_AGAIN = 1000, 1008, 1011, 1013
"""Close codes of RFC 6455 and of the IANA registry."""


class TooSlow(LensmeshError):
    """The client takes no more events; reconnect with `after`."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "QUEUE_FULL"


class EventSocket:
    """Serves every WebSocket; holds nothing of any of them.

    There is no queue here: a client that reads slowly slows its own stream down to the service by gRPC's flow control,
    and one that reads nothing for `stream_stall_seconds` is dropped with 1013 and resumes with `after`.
    """

    def __init__(
        self, route: Route, backends: Backends, verifier: TokenVerifier, metrics: GatewayMetrics, stall_seconds: float
    ) -> None:
        """Hold what a connection needs.

        Args:
            route: the stream that feeds the events.
            backends: channels to the services.
            verifier: knows the keys of user tokens.
            metrics: counts refusals, and clients that were dropped.
            stall_seconds: how long a client may take no bytes.
        """
        self.route, self.backends, self.verifier, self.metrics = route, backends, verifier, metrics
        self.stall_seconds = stall_seconds

    async def serve(self, websocket: WebSocket) -> None:
        """Accept a connection, answer its subscription, and close it with a code that says why."""
        await websocket.accept()
        try:
            feed = await self._subscribe(websocket)
            await self._forward(websocket, feed)
            await _close(websocket, ENDED, "the stream ended")
        except WebSocketDisconnect:
            return
        except (LensmeshError, grpc.aio.AioRpcError) as error:
            self.metrics.refused(error)
            await _refuse(websocket, error)
        except Exception as error:
            get_logger("gateway").error("unexpected error", exc_info=error)
            await _refuse(websocket, error)

    async def _subscribe(self, websocket: WebSocket) -> Feed:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
                wish = body.parse((await websocket.receive_text()).encode())
        except TimeoutError as error:
            raise DeadlineExceeded("the first message did not come", reason="REQUEST_TIMEOUT") from error
        except KeyError as error:  # a binary message has no text
            raise Invalid.of("message", "must be text") from error
        if not isinstance(wish, dict):
            raise Invalid.of("message", "must be an object")
        token = wish.pop("token", None)
        if not isinstance(token, str):
            raise Unauthenticated("the first message needs a token", metadata={"cause": "missing"})
        exchange: Exchange = websocket.scope[SCOPE_KEY]
        exchange.admit(self.verifier.verify(f"Bearer {token}"))
        message = self.route.request_class()
        decode(message, wish)
        metadata = call_metadata(f"Bearer {token}")
        feed = Feed(self.backends.call(self.route, message, metadata, exchange.seconds_left()))
        exchange.open.append(feed)
        return feed

    async def _forward(self, websocket: WebSocket, feed: Feed) -> None:
        sending = asyncio.create_task(self._send(websocket, feed))
        listening = asyncio.create_task(_listen(websocket))
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
            (listening if listening.done() else sending).result()
        finally:
            for task in (sending, listening):
                task.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)

    async def _send(self, websocket: WebSocket, feed: Feed) -> None:
        await feed.open(0)
        async for message in feed.messages():
            made = frame(message)
            if made.heartbeat:
                continue
            try:
                async with asyncio.timeout(self.stall_seconds):
                    await websocket.send_text(dumps(made.envelope()).decode())
            except TimeoutError as error:
                self.metrics.dropped.inc()
                raise TooSlow from error


async def _listen(websocket: WebSocket) -> None:
    """Take what a client still says, which means nothing, until it goes away."""
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])


async def _refuse(websocket: WebSocket, error: Exception) -> None:
    told = failure(error)
    code = TRY_AGAIN if told.status in (429, 503) else FAILED if told.status >= 500 else REFUSED
    with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
        async with asyncio.timeout(CLOSE_SECONDS):
            await websocket.send_text(dumps(told.body()).decode())
    await _close(websocket, code, told.code)


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
        async with asyncio.timeout(CLOSE_SECONDS):
            await websocket.close(code, reason)
