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
from gateway.config import GatewaySettings
from gateway.listener import listen, server_config
from gateway.routes import UnsafeRoutes
from services.kit.logs import configure, get_logger
from services.kit.metrics import measure_loop_lag, new_registry
from services.runtime.lifeline import follow


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
