"""Channels to other services: the mesh's own token, the current trace, retries of idempotent methods, size limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc

from services.kit.config import Settings
from services.kit.methods import methods_of
from services.kit.trace import current_request_id, current_trace

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    ("grpc.so_reuseport", 0),
    # A server takes one ping in 5 minutes by default and ends the connection, calls and all, of who sends more.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def open_channel(address: str, settings: Settings, services: tuple[str, ...] = ()) -> grpc.aio.Channel:
    """A channel that calls as the mesh itself.

    Args:
        address: host:port.
        settings: where the service token and the TLS roots are.
        services: full names of services called through it; their idempotent methods are retried on UNAVAILABLE.
    """
    token = settings.service_token_path.read_text().strip()
    options = [*OPTIONS, ("grpc.service_config", json.dumps(service_config(services)))]
    interceptors = [_Metadata(lambda: token), _StreamMetadata(lambda: token)]
    if settings.tls_ca_file is not None:
        credentials = grpc.ssl_channel_credentials(settings.tls_ca_file.read_bytes())
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


def open_blocking_channel(address: str, settings: Settings) -> grpc.Channel:
    """The same for a process without an event loop; only calls that answer with a stream carry the mesh's token.

    Args:
        address: host:port.
        settings: where the service token and the TLS roots are.
    """
    if settings.tls_ca_file is not None:
        credentials = grpc.ssl_channel_credentials(settings.tls_ca_file.read_bytes())
        channel = grpc.secure_channel(address, credentials, options=OPTIONS)
    else:
        channel = grpc.insecure_channel(address, options=OPTIONS)
    return grpc.intercept_channel(channel, _BlockingStreamToken(settings.service_token_path.read_text().strip()))


def service_config(services: tuple[str, ...]) -> dict[str, Any]:
    """Service config that retries the idempotent methods of these services."""
    names = [{"service": m.service, "method": m.name} for s in services for m in methods_of(s) if m.idempotent]
    return {"methodConfig": [{"name": names, "retryPolicy": RETRY}]} if names else {}


def _with_metadata(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    for name, value in (("traceparent", current_trace()), ("x-request-id", current_request_id())):
        if value:
            metadata.add(name, value)
    return details._replace(metadata=metadata)


class _Metadata(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(client_call_details, self._token()), request)


class _StreamMetadata(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(client_call_details, self._token()), request)


class _BlockingStreamToken(grpc.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = _Details(client_call_details, (("authorization", f"Bearer {self._token}"),))
        return continuation(details, request)


class _Details(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self.method, self.timeout = details.method, details.timeout
        self.metadata = metadata
        self.credentials, self.wait_for_ready = details.credentials, details.wait_for_ready
        self.compression = details.compression
