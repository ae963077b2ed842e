"""`python -m gateway`: settings from the environment, one HTTP listener, a graceful stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from pydantic import ValidationError

from gateway import comments, stubs
from gateway.app import Gateway
from gateway.config import GatewaySettings, parse_address
from gateway.routes import UnsafeRoutes
from services.kit.logs import configure, get_logger
from services.kit.metrics import measure_loop_lag, new_registry
from services.runtime.lifeline import follow

_BACKLOG = 512
_CLOSING_SECONDS = 15
"""Head start of our own closing, which says why, over the kernel's, which frees what we could not close."""
_FIRST_MESSAGE_BYTES = 64 * 1024
"""Largest message that a WebSocket client may send: a token and topics."""


class Server(uvicorn.Server):
    """uvicorn that ends open streams before it waits for requests in progress."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        """Serve `gateway` as `config` says."""
        super().__init__(config)
        self._gateway = gateway

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, at once on a second SIGINT, and end with status 0 instead of the signal's."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.handle_exit, signum, None)
        yield
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, drain, and close the channels."""
        self._gateway.end_streams()
        await super().shutdown(sockets)
        await self._gateway.close()


def listen(address: str, stall_seconds: float) -> socket.socket:
    """A listening socket; the kernel drops a connection whose client takes no bytes for much longer than we wait.

    Raises:
        OSError: the address is in use or not ours.
    """
    host, port = parse_address(address)
    family, kind, protocol, _, target = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int((stall_seconds + _CLOSING_SECONDS) * 1000))
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def server_config(gateway: Gateway, settings: GatewaySettings) -> uvicorn.Config:
    """How uvicorn serves the gateway: strict parsers, no compression of WebSockets, our own log."""
    return uvicorn.Config(
        gateway,
        http="h11",
        ws="websockets-sansio",
        ws_max_size=_FIRST_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )


async def serve(settings: GatewaySettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UnsafeRoutes: the stubs' annotations allow no safe table.
        ValueError: a backend's package has no stubs.
    """
    registry = new_registry()
    gateway = Gateway(settings, stubs.load(settings.backends), comments.load(), registry)
    lag = asyncio.create_task(measure_loop_lag(registry))
    host, port = listener.getsockname()[:2]
    get_logger("gateway").info("listening", address=f"{host}:{port}", backends=settings.backends)
    try:
        await Server(server_config(gateway, settings), gateway).serve([listener])
    finally:
        lag.cancel()


def main() -> int:
    """Run the gateway; the exit status."""
    try:
        settings = GatewaySettings()
        if not settings.backends:
            return _fail("set LENSMESH_BACKENDS to <proto package>=<host:port>,…")
        configure("gateway", settings.log_level)
        follow()
        listener = listen(settings.http_listen, settings.stream_stall_seconds)
    except ValidationError as error:
        told = "; ".join(f"LENSMESH_{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors())
        return _fail(told)
    except OSError as error:
        return _fail(f"cannot listen on {settings.http_listen}: {(error.strerror or str(error)).lower()}")
    try:
        asyncio.run(serve(settings, listener))
    except UnsafeRoutes as error:
        return _fail(f"the protos' annotations are not safe to serve:\n{error}")
    except ValueError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"lensmesh gateway: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
