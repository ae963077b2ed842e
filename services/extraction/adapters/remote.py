"""Units that other hosts made, fetched file by file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc

from services.extraction.adapters.files import WorkFolder
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.logs import get_logger
from services.kit.waiting import Backoff

FETCH_SECONDS = 600.0
"""Longest time for one answer."""
TRIES = 4
"""How often a file is asked for, each time from where the last answer broke off."""
_BROKEN_OFF = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


class RemoteUnits:
    """Fetches units as the mesh itself."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def fetch(self, address: str, folder: WorkFolder, unit: int, fence: int) -> bool:
        """A unit's files from the process at `address`, into their place here; False where they cannot be had."""
        async with open_channel(address, self._settings) as channel:
            stub = extraction_pb2_grpc.ExtractionServiceStub(channel)
            try:
                for sums, path in ((True, folder.moments(unit, fence)), (False, folder.shard(unit, fence))):
                    request = pb.ReadUnitRequest(extraction_id=folder.extraction_id, unit=unit, fence=fence, sums=sums)
                    await _fetch_file(stub, request, path)
            except grpc.aio.AioRpcError as error:
                get_logger("extraction").warning(
                    "unit not fetched", extraction=folder.extraction_id, unit=unit, code=error.code().name
                )
                return False
        return True


async def _fetch_file(stub: Any, request: pb.ReadUnitRequest, path: Path) -> None:
    """Under another name until it is whole; a shard goes on behind what an earlier try, or process, has of it.

    Not flushed, as the digest is checked whenever a job goes on.
    """
    partial, backoff = path.with_suffix(".part"), Backoff(first=0.2, last=2.0)
    if request.sums:  # they have no digest, and are small
        partial.unlink(missing_ok=True)
    for left in reversed(range(TRIES)):
        with partial.open("ab") as file:
            request.offset = file.tell()
            try:
                async for part in stub.ReadUnit(request, timeout=FETCH_SECONDS):
                    await asyncio.to_thread(file.write, part.data)
                break
            except grpc.aio.AioRpcError as error:
                if not left or error.code() not in _BROKEN_OFF:
                    raise
        await asyncio.sleep(backoff.next())
    partial.replace(path)
