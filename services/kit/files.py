"""Files as streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from services.kit import errors

CHUNK_BYTES = 1 << 20
"""Bytes of one message of a stream."""


async def chunks(path: Path, offset: int, end: int, *, what: str) -> AsyncIterator[bytes]:
    """Bytes of a file from `offset` up to `end`, at most CHUNK_BYTES at a time.

    Raises:
        errors.Failed: `CHECKSUM_MISMATCH`: it is shorter; the message says that `what` ended early.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while offset < end:
            chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, end - offset))
            if not chunk:
                raise errors.Failed(f"the {what} ended early", reason="CHECKSUM_MISMATCH")
            offset += len(chunk)
            yield chunk
