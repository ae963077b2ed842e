"""Settings of the gateway."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from services.kit.config import Bytes, Settings


def parse_address(value: str) -> tuple[str, int]:
    """(host, port) of `host:port`; an IPv6 host stands in brackets.

    Raises:
        ValueError: there is no port, or it is not one.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _backends(value: object) -> object:
    if not isinstance(value, str):
        return value
    made: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        package, equals, address = (part.strip() for part in entry.partition("="))
        if not equals or not package:
            raise ValueError(f"{entry!r} is not <proto package>=<host:port>")
        parse_address(address)
        if made.setdefault(package, address) != address:
            raise ValueError(f"{package} has two addresses")
    return made


def _listen(value: object) -> object:
    if isinstance(value, str):
        parse_address(value)
    return value


def _words(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class GatewaySettings(Settings):
    """What the gateway reads from `LENSMESH_*` variables."""

    http_listen: Annotated[str, BeforeValidator(_listen)] = "127.0.0.1:8080"
    """Address to serve HTTP on, host:port; port 0 takes a free one."""
    backends: Annotated[dict[str, str], NoDecode, BeforeValidator(_backends)] = Field(default_factory=dict)
    """Services behind the gateway, `<proto package>=<host:port>,…`."""
    cors_origins: Annotated[list[str], NoDecode, BeforeValidator(_words)] = Field(default_factory=list)
    """Origins, comma-separated, whose pages may call this gateway; none by default."""
    http_max_body: Annotated[Bytes, Field(ge=1024)] = 8 * 1024 * 1024 - 64 * 1024
    """Largest request body in bytes; a little below what a service takes as one message."""
    http_request_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send its headers, and then again its body, in seconds."""
    http_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Deadline of a call whose client names none (`X-Request-Timeout`), in seconds."""
    http_timeout_limit_seconds: Annotated[float, Field(gt=0)] = 900.0
    """Longest deadline that a client may ask for, in seconds."""
    stream_heartbeat_seconds: Annotated[float, Field(gt=0)] = 15.0
    """A silent stream is told that it lives after this many seconds."""
    stream_stall_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A client that takes no bytes for this many seconds is dropped."""
