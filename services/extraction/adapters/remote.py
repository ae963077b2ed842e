"""Units that other hosts made, fetched file by file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc

from services.extraction.adapters.files import WorkFolder
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.logs import get_logger

FETCH_SECONDS = 600.0
"""Longest time for one file."""


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
                    await _write(path, stub.ReadUnit(request, timeout=FETCH_SECONDS))
            except grpc.aio.AioRpcError as error:
                get_logger("extraction").warning(
                    "unit not fetched", extraction=folder.extraction_id, unit=unit, code=error.code().name
                )
                return False
        return True


async def _write(path: Path, parts: grpc.aio.UnaryStreamCall) -> None:
    """Under another name until it is whole; not flushed, as the digest is checked whenever a job goes on."""
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        async for part in parts:
            await asyncio.to_thread(file.write, part.data)
    partial.replace(path)
