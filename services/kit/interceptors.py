"""The one server interceptor: trace, authentication, policy, validation, metrics, audit, and errors as statuses.

A call passes here before its servicer runs, in the same order in every process, so that users of stubs and of HTTP
meet the same rules. Servicers and operations raise `services.kit.errors`; nothing else becomes a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import Message
from grpc_status import rpc_status

from services.kit import auth, errors, status, trace
from services.kit.logs import get_logger
from services.kit.masks import check_mask, masked
from services.kit.methods import Method
from services.kit.metrics import RpcMetrics

Audit = Callable[[auth.Caller, str, str, str], Awaitable[None]]
"""Takes caller, method, resource id and outcome (`OK` or the error's reason)."""
_OPEN_SERVICES = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1alpha.ServerReflection/",
    "/grpc.reflection.v1.ServerReflection/",
)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method; one that is not listed is refused, health and reflection excepted."""

    def __init__(
        self, methods: list[Method], verifier: auth.TokenVerifier, metrics: RpcMetrics, audit: Audit | None = None
    ) -> None:
        self._methods = {method.path: method for method in methods}
        self._verifier = verifier
        self._metrics = metrics
        self._audit = audit
        self._validator = protovalidate.Validator()
        self._log = get_logger("rpc")

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Replace the method's handler by one that applies the rules first."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or path.startswith(_OPEN_SERVICES):
            return handler
        method = self._methods.get(path)
        if method is None:
            return None
        metadata = dict(handler_call_details.invocation_metadata or ())
        serializers = (handler.request_deserializer, handler.response_serializer)
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream, metadata), *serializers
            )
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary, metadata), *serializers)

    def _unary(self, method: Method, behavior: Any, metadata: dict[str, Any]) -> Any:
        async def call(request: Message, context: grpc.aio.ServicerContext) -> Message:
            async with self._rules(method, request, context, metadata):
                return masked(request, await behavior(request, context))
            raise AssertionError("a failed call is aborted")

        return call

    def _stream(self, method: Method, behavior: Any, metadata: dict[str, Any]) -> Any:
        async def call(request: Message, context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
            async with self._rules(method, request, context, metadata):
                async for message in behavior(request, context):
                    yield message

        return call

    @asynccontextmanager
    async def _rules(
        self, method: Method, request: Message, context: grpc.aio.ServicerContext, metadata: dict[str, Any]
    ) -> AsyncIterator[None]:
        trace.begin(metadata.get("traceparent"), metadata.get("x-request-id"))
        with self._metrics.call(method) as ended_with:
            try:
                self._admit(method, metadata.get("authorization"))
                self._validate(request)
                check_mask(request, method.reply)
                yield
                await self._record(method, request, "OK")
            except (asyncio.CancelledError, GeneratorExit):
                ended_with("CANCELLED")
                raise
            except grpc.aio.AbortError:
                raise
            except BaseException as error:
                known = self._known(method, error)
                ended_with(known.code)
                await self._record(method, request, known.reason)
                await context.abort_with_status(rpc_status.to_status(status.to_status(known)))

    def _admit(self, method: Method, authorization: str | None) -> None:
        """Who calls, and whether the policy lets them.

        Raises:
            errors.Unauthenticated: no valid token.
            errors.Forbidden: the token lacks a scope, or the method is the mesh's own.
        """
        if method.policy.public:
            auth.set_caller(auth.Caller(subject="anonymous"))
            return
        try:
            caller = self._verifier.verify(authorization)
        except errors.Unauthenticated as error:
            self._metrics.refused(str(error.metadata.get("cause", "malformed")))
            raise
        auth.set_caller(caller)
        if caller.internal:
            return
        if method.policy.internal or not method.policy.scopes:
            self._metrics.refused("internal_only")
            raise errors.Forbidden("only the mesh itself may call this", reason="INTERNAL_ONLY")
        missing = sorted(set(method.policy.scopes) - caller.scopes)
        if missing:
            self._metrics.refused("scope_missing")
            raise errors.Forbidden(f"the token lacks {', '.join(missing)}", metadata={"required": ",".join(missing)})

    def _validate(self, request: Message) -> None:
        violations = [(_path(v.proto), v.proto.message) for v in self._validator.collect_violations(request)]
        if violations:
            raise errors.Invalid("; ".join(f"{field}: {text}" for field, text in violations), violations=violations)

    def _known(self, method: Method, error: BaseException) -> errors.LensmeshError:
        if isinstance(error, errors.LensmeshError):
            if error.code == "INTERNAL":
                self._log.error("call failed", method=method.path, reason=error.reason, error=error.message)
            return error
        if isinstance(error, grpc.aio.AioRpcError):
            return status.from_rpc_error(error)
        opaque, known = status.unknown()
        self._log.error("unexpected error", method=method.path, error_id=opaque, exc_info=error)
        return known

    async def _record(self, method: Method, request: Message, outcome: str) -> None:
        if self._audit is None or not method.writes:
            return
        try:
            caller = auth.current_caller()
            if not caller.internal:
                await self._audit(caller, method.path, _resource(request), outcome)
        except errors.Unauthenticated:
            return
        except errors.LensmeshError as error:
            self._log.warning("audit row not written", method=method.path, reason=error.reason)


def _resource(request: Message) -> str:
    for name in ("id", "group_id", "model_id"):
        if name in request.DESCRIPTOR.fields_by_name:
            return str(getattr(request, name))
    return ""


def _path(violation: Any) -> str:
    """`a.b[2]` from a protovalidate field path; the oneof's own rule names the message."""
    parts = ""
    for element in violation.field.elements if violation.field else ():
        parts += ("." if parts else "") + element.field_name
        if element.subscript is not None and element.subscript.field:
            parts += f"[{element.subscript.value}]"
    return parts or "request"
