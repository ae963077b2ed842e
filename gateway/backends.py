"""gRPC channels to the services, and the one way in which the gateway calls a method."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.exchange import Metadata
from gateway.routes import Route
from services.kit.channels import OPTIONS, service_config
from services.kit.errors import Unavailable
from services.kit.health import REASON_KEY

READY = "ready"
HEALTH_SECONDS = 2.0
"""How long a service may take to say whether it is ready."""


class Backends:
    """One channel per address; a method finds its channel by its proto package."""

    def __init__(self, addresses: Mapping[str, str], services: Iterable[str], ca_file: Path | None = None) -> None:
        """Open the channels; connecting happens with the first call and again after every loss.

        Args:
            addresses: proto package -> host:port.
            services: full names of all services; their idempotent methods are retried when they are not reached.
            ca_file: root certificates; plain text without.
        """
        self.addresses = dict(addresses)
        options = [*OPTIONS, ("grpc.service_config", json.dumps(service_config(tuple(sorted(set(services))))))]
        secrets = grpc.ssl_channel_credentials(ca_file.read_bytes()) if ca_file else None
        self._channels = {address: _open(address, secrets, options) for address in sorted(set(addresses.values()))}
        self._calls: dict[str, Any] = {}

    def call(self, route: Route, message: Any, metadata: Metadata, timeout: float | None) -> Any:
        """Start the route's call: a `UnaryUnaryCall` or, for a stream, a `UnaryStreamCall`.

        Raises:
            Unavailable: LENSMESH_BACKENDS does not name the method's package.
        """
        path = route.method.call_path
        if path not in self._calls:
            address = self.addresses.get(route.method.package)
            if address is None:
                raise Unavailable(f"no backend is configured for {route.method.package}")
            channel = self._channels[address]
            opener = channel.unary_stream if route.streams else channel.unary_unary
            self._calls[path] = opener(
                path,
                request_serializer=route.request_class.SerializeToString,
                response_deserializer=route.response_class.FromString,
            )
        return self._calls[path](message, metadata=metadata, timeout=timeout)

    async def readiness(self) -> dict[str, str]:
        """Per proto package `READY`, or why it is not."""
        answers = await asyncio.gather(*(_ready(channel) for channel in self._channels.values()))
        by_address = dict(zip(self._channels, answers, strict=True))
        return {package: by_address[address] for package, address in sorted(self.addresses.items())}

    async def close(self) -> None:
        """Close every channel; running calls are cancelled."""
        for channel in self._channels.values():
            await channel.close()


async def _ready(channel: grpc.aio.Channel) -> str:
    try:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)
        answer = await call
    except grpc.aio.AioRpcError as error:
        return "does not answer" if error.code() is grpc.StatusCode.UNAVAILABLE else error.code().name.lower()
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return READY
    reason = dict(await call.trailing_metadata() or ()).get(REASON_KEY)
    return str(reason or "not serving")


def _open(address: str, secrets: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
    if secrets is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, secrets, options=options)
