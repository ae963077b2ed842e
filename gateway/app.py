"""The gateway as an ASGI application: derived routes, fixed pages, and what surrounds every exchange."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

import grpc
from google.protobuf.descriptor import FileDescriptor
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import routes
from gateway.backends import Backends
from gateway.comments import Comments
from gateway.config import GatewaySettings
from gateway.errors import Failure, failure
from gateway.exchange import SCOPE_KEY, Exchange
from gateway.metrics import GatewayMetrics
from gateway.pages import Pages
from gateway.reply import error_reply
from gateway.transcode import Transcoder
from gateway.websocket import EventSocket
from services.kit import trace
from services.kit.auth import TokenVerifier
from services.kit.errors import LensmeshError
from services.kit.logs import get_logger

_EXPOSED = ["X-Request-Id", "Retry-After", "Content-Range", "Accept-Ranges", "ETag", "Allow"]
_SENT = [
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "Range",
    "X-Request-Id",
    "X-Request-Timeout",
]


class Stalled(Exception):
    """The client took no bytes for too long."""


class Gateway:
    """Everything behind the HTTP listener, and the channels it holds."""

    def __init__(
        self, settings: GatewaySettings, files: Iterable[FileDescriptor], comments: Comments, metrics: CollectorRegistry
    ) -> None:
        """Derive the routes and open the channels.

        Args:
            settings: addresses, limits, keys.
            files: the stubs' files.
            comments: what the protos say about their elements.
            metrics: where the gateway's metrics are registered.

        Raises:
            UnsafeRoutes: the annotations allow no safe table.
        """
        table = routes.build(files)
        every = [*table.routes, *([table.websocket] if table.websocket else [])]
        self.settings = settings
        self._open: set[Exchange] = set()
        self.metrics = GatewayMetrics(metrics, table.routes, lambda: sum(bool(one.open) for one in self._open))
        self.backends = Backends(settings.backends, (route.method.service for route in every), settings.tls_ca_file)
        verifier = TokenVerifier(settings.jwt_keys, None, issuer=settings.jwt_issuer, audience=settings.jwt_audience)
        self.pages = Pages(table, comments, self.backends, metrics)
        self.transcoder = Transcoder(table, self.backends, verifier, settings)
        self.socket = self._socket(table, verifier)
        self._log = get_logger("gateway.access")
        self._inner: ASGIApp = self._serve
        if settings.cors_origins:
            self._inner = CORSMiddleware(
                self._serve,
                allow_origins=settings.cors_origins,
                allow_methods=routes.VERBS,
                allow_headers=_SENT,
                expose_headers=_EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange, count and log it, and let nothing of it live on."""
        if scope["type"] not in ("http", "websocket"):
            raise ValueError(f"no {scope['type']} here")
        headers = Headers(scope=scope)
        trace.begin(headers.get("traceparent"), headers.get("x-request-id"))
        exchange = scope[SCOPE_KEY] = Exchange()
        started, status = time.perf_counter(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = trace.current_request_id()
            try:
                async with asyncio.timeout(self.settings.stream_stall_seconds if scope["type"] == "http" else None):
                    await send(message)
            except TimeoutError as error:
                raise Stalled from error

        self._open.add(exchange)
        try:
            await self._inner(scope, receive, observed)
        except Stalled:
            self.metrics.dropped.inc()
        finally:
            exchange.end()
            self._open.discard(exchange)
            self._observe(scope, exchange, status, time.perf_counter() - started)

    def _socket(self, table: routes.Table, verifier: TokenVerifier) -> EventSocket | None:
        if table.websocket is None:
            return None
        stall = self.settings.stream_stall_seconds
        return EventSocket(table.websocket, self.backends, verifier, self.metrics, stall)

    def end_streams(self) -> None:
        """End every open stream, so that a stop does not wait for clients that listen for ever."""
        for exchange in self._open:
            exchange.end()

    async def close(self) -> None:
        """End the streams and close the channels."""
        self.end_streams()
        await self.backends.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._serve_websocket(WebSocket(scope, receive, send))
            return
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            page = await self.pages.answer(request)
            return page if page is not None else await self.transcoder.answer(request)
        except Exception as error:
            return await error_reply(request.headers, self._told(error))

    async def _serve_websocket(self, websocket: WebSocket) -> None:
        if self.socket is None or websocket.scope["path"] != routes.WEBSOCKET_PATH:
            missing = LensmeshError("there is no WebSocket here", reason="ROUTE_NOT_FOUND")
            await websocket.send_denial_response(await error_reply(websocket.headers, failure(missing)))
            return
        websocket.scope[SCOPE_KEY].route = routes.WEBSOCKET_PATH
        with self.metrics.websockets.track_inprogress():
            await self.socket.serve(websocket)

    def _told(self, error: Exception) -> Failure:
        self.metrics.refused(error)
        told = failure(error)
        if told.status == 500 and not isinstance(error, LensmeshError | grpc.aio.AioRpcError):
            self._log.error("unexpected error", exc_info=error)
        return told

    def _observe(self, scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
        method = scope.get("method", "WEBSOCKET")
        method = method if method in (*routes.VERBS, "HEAD", "OPTIONS", "WEBSOCKET") else "other"
        self.metrics.requests.labels(exchange.route, method, str(status or 101)).inc()
        self.metrics.seconds.labels(exchange.route, method).observe(seconds)
        # Probes and scrapes come every few seconds and say nothing new.
        level = logging.DEBUG if exchange.route in self.pages.paths else logging.INFO
        self._log.log(
            level,
            "http request",
            method=method,
            route=exchange.route,
            status=status,
            seconds=round(seconds, 6),
            subject=exchange.subject,
            client=(scope.get("client") or ("",))[0],
        )
