"""The HTTP listener: a socket and a parser that stalled and silent clients cannot hold for ever."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.app import Gateway
from gateway.config import GatewaySettings, parse_address

_BACKLOG = 512
_CLOSING_SECONDS = 15
"""Head start of our own closing, which says why, over the kernel's, which frees what we could not close."""
_FIRST_MESSAGE_BYTES = 64 * 1024
"""Largest message that a WebSocket client may send: a token and topics."""


def listen(address: str, stall_seconds: float) -> socket.socket:
    """A listening socket; the kernel drops a connection whose client takes no bytes for much longer than we wait.

    Raises:
        OSError: the address is in use or not ours.
    """
    host, port = parse_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, target = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; without it a client with a closed window keeps its socket for ever.
        timeout = int((stall_seconds + _CLOSING_SECONDS) * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def server_config(gateway: Gateway, settings: GatewaySettings) -> uvicorn.Config:
    """How uvicorn serves the gateway: strict parsers, no compression of WebSockets, our own log."""

    class Protocol(ImpatientH11):
        header_seconds = settings.http_request_seconds

    return uvicorn.Config(
        gateway,
        http=Protocol,
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


class ImpatientH11(H11Protocol):
    """uvicorn's parser, which drops a client that does not finish its headers in time; uvicorn would wait for ever."""

    header_seconds: float
    """How long the headers of a request may take, in seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first headers."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Stop to wait once the headers are complete; wait again when later ones begin."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
