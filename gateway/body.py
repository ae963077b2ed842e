"""Bytes of a request -> a JSON value, within limits that keep memory and the stack bounded."""

from __future__ import annotations

import asyncio
import json
from email.message import Message as Headers

from starlette.requests import Request

from services.kit.errors import DeadlineExceeded, Invalid, LensmeshError, TooLarge

MAX_DEPTH = 32
"""Nesting of arrays and objects; a google.protobuf.Value needs three levels of protobuf's 100 for each."""


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body, whether it has a length or comes in chunks.

    Raises:
        TooLarge: more than `limit` bytes; nothing after the limit is kept.
        DeadlineExceeded: the client did not send it within `seconds`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    received = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                received += chunk
                if len(received) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the request body did not arrive within {seconds:g} s", reason="REQUEST_TIMEOUT"
        ) from error
    return bytes(received)


def require_type(request: Request, wanted: str) -> None:
    """Refuse a body of another content type, another charset or with a content encoding.

    Raises:
        LensmeshError: UNSUPPORTED_MEDIA_TYPE.
    """
    header = Headers()
    header["content-type"] = request.headers.get("content-type", "")
    given = header.get_content_type() if header["content-type"] else "no content type"
    charset = (header.get_param("charset") or "utf-8") if header["content-type"] else "utf-8"
    encoding = request.headers.get("content-encoding", "identity")
    if given != wanted or str(charset).lower() != "utf-8" or encoding != "identity":
        said = given if given != wanted else f"{given}; charset={charset}, encoding {encoding}"
        raise LensmeshError(f"send {wanted} in UTF-8 without an encoding, not {said}", reason="UNSUPPORTED_MEDIA_TYPE")


def parse(data: bytes) -> object:
    """The JSON value that `data` spells; an empty body is an empty object.

    Raises:
        Invalid: not UTF-8, not JSON, a name twice in one object, NaN or Infinity.
        TooLarge: nested deeper than the interpreter's stack allows, or a number of thousands of digits.
    """
    if not data.strip():
        return {}
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise too_deep() from error
    except json.JSONDecodeError as error:
        raise Invalid.of("body", f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Invalid.of("body", f"is not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise Invalid.of("body", "holds a number with too many digits") from error


def too_deep() -> TooLarge:
    """The error for a value that is nested deeper than `MAX_DEPTH`."""
    return TooLarge(f"the body is nested deeper than {MAX_DEPTH} levels", metadata={"max_depth": MAX_DEPTH})


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes", metadata={"max_bytes": limit})


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Invalid.of(twice[:100], "is given twice")
    return made


def _no_constant(text: str) -> object:
    raise Invalid.of("body", f"{text} is not JSON")
