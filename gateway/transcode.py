"""One HTTP request -> one gRPC call -> one HTTP reply, for any method that has a binding."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gateway import body, query, stream
from gateway.backends import Backends
from gateway.config import GatewaySettings
from gateway.decode import decode
from gateway.encode import encode, prune
from gateway.exchange import SCOPE_KEY, Exchange, Metadata, call_metadata, deadline
from gateway.frames import AFTER_FIELD
from gateway.reply import byte_range, json_reply
from gateway.routes import Match, Route, Table
from gateway.stubs import HTTP_BODY
from services.kit.auth import TokenVerifier
from services.kit.errors import Invalid, LensmeshError

STATUS_KEY = "x-http-status"
"""Trailing metadata with which a service chooses another 2xx than the method's policy."""


class Cancelled(LensmeshError):
    """The client went away."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class Transcoder:
    """Answers every request whose path a method binds."""

    def __init__(self, table: Table, backends: Backends, verifier: TokenVerifier, settings: GatewaySettings) -> None:
        """Hold what a call needs.

        Args:
            table: all routes.
            backends: channels to the services.
            verifier: knows the keys of user tokens, and not the mesh's own token, which is none of HTTP's.
            settings: limits and deadlines.
        """
        self.table, self.backends, self.verifier, self.settings = table, backends, verifier, settings

    async def answer(self, request: Request) -> Response:
        """The reply to one request.

        Raises:
            LensmeshError: the gateway refuses the request.
            grpc.aio.AioRpcError: the service does.
        """
        exchange: Exchange = request.scope[SCOPE_KEY]
        match = self.find(request)
        exchange.route = match.route.template.text
        authorization = self.authenticate(request.headers, exchange, match.route)
        message = await self.read(request, match)
        timeout = deadline(request.headers, self.settings.http_timeout_limit_seconds)
        if match.route.streams:
            return await self._stream(request, match.route, message, call_metadata(authorization), timeout)
        timeout = timeout or self.settings.http_timeout_seconds
        call = self.backends.call(match.route, message, call_metadata(authorization), timeout)
        reply = await _unless_gone(request, call)
        return await _reply(request, match.route, message, reply, await call.trailing_metadata())

    def find(self, request: Request) -> Match:
        """The route of a request.

        Raises:
            LensmeshError: ROUTE_NOT_FOUND or METHOD_NOT_ALLOWED.
        """
        raw_path = request.scope.get("raw_path", request.scope["path"].encode()).decode("latin-1")
        verb = "GET" if request.method == "HEAD" else request.method
        try:
            match = self.table.find(verb, raw_path)
            verbs = [] if match else self.table.verbs(raw_path)
        except UnicodeDecodeError as error:
            raise Invalid.of("path", "is not UTF-8") from error
        if match is not None:
            return match
        if verbs:
            allowed = ", ".join(verbs)
            raise LensmeshError(f"this path takes {allowed}", reason="METHOD_NOT_ALLOWED", metadata={"allow": allowed})
        raise LensmeshError("there is no such route; GET /docs lists them", reason="ROUTE_NOT_FOUND")

    def authenticate(self, headers: Headers, exchange: Exchange, route: Route) -> str:
        """The `authorization` to forward, checked early; the service checks it again, and its scopes.

        Raises:
            Unauthenticated: the route needs a token, and there is none that is valid.
        """
        authorization = headers.get("authorization", "")
        if authorization or not route.public:
            exchange.admit(self.verifier.verify(authorization))
        return authorization

    async def read(self, request: Request, match: Match) -> Message:
        """The request message from body, query, path and headers.

        Raises:
            Invalid: a field is wrong; each is named.
            TooLarge: the body is over its limit or nested too deeply.
        """
        route, binding = match.route, match.route.binding
        message = route.request_class()
        data = await self._body(request, binding.body)
        if binding.body:
            target: Any = message if binding.body == "*" else getattr(message, binding.body)
            if target.DESCRIPTOR.full_name == HTTP_BODY:
                target.content_type, target.data = request.headers.get("content-type", ""), data
            else:
                if data:
                    body.require_type(request, "application/json")
                decode(target, body.parse(data), at="" if binding.body == "*" else binding.body)
        query.fill(message, dict(match.variables), request.scope["query_string"], body=binding.body)
        _from_headers(message, request.headers, raw=route.raw)
        _check_mask(message, route.method.descriptor.output_type)
        return message

    async def _body(self, request: Request, wanted: str) -> bytes:
        try:
            data = await body.read(request, self.settings.http_max_body, self.settings.http_request_seconds)
        except ClientDisconnect as error:
            raise Cancelled from error
        if data and not wanted:
            raise Invalid.of("body", "this route takes none")
        return data

    async def _stream(
        self,
        request: Request,
        route: Route,
        message: Any,
        metadata: Metadata,
        timeout: float | None,
    ) -> Response:
        exchange: Exchange = request.scope[SCOPE_KEY]
        lifetime = min(filter(None, (timeout, exchange.seconds_left())), default=None)

        def start() -> stream.Feed:
            feed = stream.Feed(self.backends.call(route, message, metadata, lifetime))
            exchange.open.append(feed)
            return feed

        def whole() -> stream.Feed:
            message.ClearField("offset")
            message.ClearField("length")
            return start()

        if route.raw:
            return await stream.raw(request, start(), whole, timeout or self.settings.http_timeout_seconds)
        settings = self.settings
        return await stream.events(
            request, start(), route, settings.stream_heartbeat_seconds, settings.stream_stall_seconds
        )


async def _unless_gone(request: Request, call: Any) -> Any:
    """Wait for a call; cancel it when the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(hang_up())
    answer = asyncio.ensure_future(call)
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Cancelled
        return answer.result()
    finally:
        gone.cancel()
        call.cancel()


async def _reply(request: Request, route: Route, message: Any, reply: Any, metadata: Any) -> Response:
    policy = route.method.policy
    status = (policy.success_status if policy is not None else 0) or 200
    if getattr(message, "validate_only", False):
        status = 200
    chosen = dict(metadata or ()).get(STATUS_KEY, "")
    if isinstance(chosen, str) and chosen.isdecimal() and 200 <= int(chosen) < 300:
        status = int(chosen)
    if route.raw:
        headers = {"x-content-type-options": "nosniff"}
        return Response(reply.data, status, headers, reply.content_type or "application/octet-stream")
    if status == 204:
        return Response(status_code=204)
    value = _masked(message, reply, encode(reply))
    if route.binding.response_body:
        value = value.get(route.binding.response_body)
    return await json_reply(request.headers, value, status)


def _masked(message: Any, reply: Any, value: Any) -> Any:
    """With a `read_mask`, only its fields of the resource: of each listed one where the reply is a page."""
    if not _has_mask(message):
        return value
    listed = _listed(reply.DESCRIPTOR)
    if listed is not None:
        return {**value, listed.name: prune(value[listed.name], message.read_mask.paths)}
    return prune(value, message.read_mask.paths)


def _has_mask(message: Any) -> bool:
    return "read_mask" in message.DESCRIPTOR.fields_by_name and bool(message.read_mask.paths)


def _listed(reply: Descriptor) -> FieldDescriptor | None:
    """The list of a page: its first field."""
    first = reply.fields[0] if reply.fields else None
    return first if first is not None and first.is_repeated and first.message_type is not None else None


def _check_mask(message: Any, reply: Descriptor) -> None:
    if _has_mask(message):
        listed = _listed(reply)
        resource = listed.message_type if listed is not None else reply
        unknown = [path for path in message.read_mask.paths if query.resolve(resource, path) is None]
        if unknown:
            raise Invalid.of("read_mask", f"{unknown[0][:100]!r} is not a field of the reply")


def _from_headers(message: Any, headers: Headers, *, raw: bool) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    key = headers.get("idempotency-key")
    if key is not None and "request_id" in fields:
        if message.request_id not in ("", key):
            raise Invalid.of("request_id", "differs from the Idempotency-Key header")
        message.request_id = key
    last = headers.get("last-event-id")
    if last is not None and AFTER_FIELD in fields:
        if not last.isdecimal():
            raise Invalid.of("Last-Event-ID", "must be the sequence of the last event seen")
        decode(message, {AFTER_FIELD: last})
    wanted = byte_range(headers) if raw else None
    if wanted is not None and "offset" in fields and "length" in fields:
        message.offset = wanted[0]
        message.length = 0 if wanted[1] is None else wanted[1] - wanted[0] + 1
