"""Addresses of the local mesh, chosen before a process starts, so that a restarted one keeps its own."""

from __future__ import annotations

import socket

from services.runtime.errors import StartError


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


def reserve(host: str, port: int) -> int:
    """The port itself when it can be listened on, a free one for port 0.

    Raises:
        StartError: the port is taken, or the host is not one of this machine's addresses.
    """
    return reserve_all([(host, port)])[0]


def reserve_all(addresses: list[tuple[str, int]]) -> list[int]:
    """Like `reserve`, for several at once: all are different.

    Raises:
        StartError: as `reserve`.
    """
    probes: list[socket.socket] = []
    try:
        for host, port in addresses:
            probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            probes.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                raise StartError(f"cannot listen on {join_address(host, port)}: {error.strerror}") from error
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
