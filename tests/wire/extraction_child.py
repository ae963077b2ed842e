"""A process that works on extractions until it is killed: `python -m tests.wire.extraction_child DSN STATE TEXTS`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import torch

from services.kit.database import Database
from tests.wire.extraction_support import DATASET, meshing


async def main(dsn: str, state: Path, texts: list[str]) -> None:
    torch.set_num_threads(1)
    database = await Database.open(dsn)
    async with meshing(database, state, lease_seconds=1.5) as mesh:
        mesh.registry.texts = {DATASET: texts}
        async with mesh.working("killed"):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())))
