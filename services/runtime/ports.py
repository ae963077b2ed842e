"""Addresses of the local mesh, chosen before a process starts, so that a restarted one keeps its own."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

from services.runtime.errors import StartError

_FREE = range(20_000, 32_000)
_CLAIMS: list[socket.socket] = []
"""Kept until this process ends: a port is chosen well before the process listens that it is for."""


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[v6]:PORT`.

    Raises:
        StartError: no such form, or no such port.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise StartError(f"{text!r} is not HOST:PORT (example: 127.0.0.1:8080)")
    return host.strip("[]") or "127.0.0.1", int(port)


def join_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reserve_all(addresses: list[tuple[str, int]]) -> list[int]:
    """A port for each address, all different: its own when it can be listened on, a free one for port 0.

    Free ones lie below the range that Linux gives to outgoing connections, so that none of those is in the way when a
    process is started again.

    Raises:
        StartError: a port is taken, or a host is not one of this machine's addresses.
    """
    with ExitStack() as stack:
        return [stack.enter_context(_listener(host, port)).getsockname()[1] for host, port in addresses]


def _listener(host: str, port: int) -> socket.socket:
    if port:
        return _bind(host, port)
    for candidate in random.sample(_FREE, 100):
        with suppress(StartError):
            listener = _bind(host, candidate)
            if _claim(candidate):
                return listener
            listener.close()
    return _bind(host, 0)


def _claim(port: int) -> bool:
    """Keep a port from other meshes: by an abstract socket that nobody listens on, and Linux drops with the process."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0lensmesh-port-{port}")
    except OSError:
        claim.close()
        return False
    _CLAIMS.append(claim)
    return True


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {join_address(host, port)}: {error.strerror}") from error
    return listener
