"""One extraction by two processes: `python -m tests.bench.extraction_shared [--sequences N]`.

Both run on one thread each and share a host, a database and an artifact store. The same extraction is made by one
process, by two, and by two of which the helper is killed with -9 half-way; the cache must be the same.
Two are expected to take about half the time, on a machine with two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction.adapters import help as helping
from services.kit import migrate
from services.kit.database import Database
from tests import support
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL, Mesh, meshing
from tests.wire.test_extraction import texts

HELPER = "helper"


async def take_part(dsn: str, state: Path, sequences: int, role: str) -> None:
    """Work on extractions, or help with them, until killed."""
    database = await Database.open(dsn)
    async with meshing(database, state, incarnation=role) as mesh:
        mesh.registry.texts = {DATASET: texts(sequences)}
        await mesh.registry.pool.load(MODEL, mesh.registry.folder, "none")
        async with mesh.background() if role == HELPER else mesh.working(role):
            await asyncio.Event().wait()


def child(dsn: str, state: Path, sequences: int, role: str) -> None:
    torch.set_num_threads(1)
    helping.LOOK_SECONDS, helping.HELP_AFTER = 0.05, timedelta(0)
    asyncio.run(take_part(dsn, state, sequences, role))


@asynccontextmanager
async def process(*arguments: Any) -> AsyncIterator[multiprocessing.context.SpawnProcess]:
    """A child for the length of the block."""
    started = multiprocessing.get_context("spawn").Process(target=child, args=arguments, daemon=True)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        await asyncio.to_thread(started.join)


async def helped(mesh: Mesh) -> int:
    """Units that the helper has made or is making."""
    return await mesh.context.database.pool.fetchval(
        "SELECT count(*) FROM extraction_units WHERE holder = $1 AND digest IS NOT NULL", HELPER
    )


async def extracted(mesh: Mesh) -> pb.Extraction:
    """The extraction, whose cache is deleted again so that the next one is not answered from it."""
    started = await mesh.extract(layer_indices=[3], batch_size=16)
    return await ended(mesh, started.extraction_id)


async def ended(mesh: Mesh, extraction_id: str) -> pb.Extraction:
    async def done() -> pb.Extraction | None:
        found = await mesh.get(extraction_id)
        return found if found.status in (pb.EXTRACTION_STATUS_COMPLETED, pb.EXTRACTION_STATUS_FAILED) else None

    found = await eventually(done, timeout=500)
    assert found.status == pb.EXTRACTION_STATUS_COMPLETED, found
    await mesh.stub.DeleteActivationCache(pb.DeleteActivationCacheRequest(id=found.cache_id))
    return found


async def compare(dsn: str, state: Path, sequences: int) -> dict[str, Any]:
    database = await Database.open(dsn)
    async with meshing(database, state, incarnation="asks") as mesh, process(dsn, state, sequences, "worker"):
        mesh.registry.texts = {DATASET: texts(sequences)}
        await extracted(mesh)  # everybody is warm
        alone = await extracted(mesh)
        async with process(dsn, state, sequences, HELPER):
            while True:  # until the helper has started and found something to do
                started = await mesh.extract(layer_indices=[3], batch_size=16)
                seen = asyncio.create_task(ended(mesh, started.extraction_id))
                found = 0
                while not seen.done():
                    found = max(found, await helped(mesh))
                    await asyncio.sleep(0.02)
                await seen
                if found:
                    break
            together = await extracted(mesh)
        async with process(dsn, state, sequences, HELPER) as helper:
            killed: pb.Extraction | None = None
            while helper.is_alive():
                started = await mesh.extract(layer_indices=[3], batch_size=16)
                seen = asyncio.create_task(ended(mesh, started.extraction_id))
                while not seen.done():
                    if helper.is_alive() and await helped(mesh) >= 2:
                        helper.kill()
                    await asyncio.sleep(0.02)
                killed = await seen
        assert killed is not None, "the helper was alive before"
    uris = {alone.storage_uri, together.storage_uri, killed.storage_uri}
    return {
        "seconds_alone": round(alone.extraction_time_seconds, 2),
        "seconds_together": round(together.extraction_time_seconds, 2),
        "speedup": round(alone.extraction_time_seconds / together.extraction_time_seconds, 2),
        "units_by_the_helper": found,
        "seconds_with_a_killed_helper": round(killed.extraction_time_seconds, 2),
        "same_bytes": len(uris) == 1,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=20_000)
    sequences = parser.parse_args().sequences
    with support.postgres_server() as dsn, tempfile.TemporaryDirectory() as state:
        url = dsn.format("postgres")
        support.run_async(migrate.upgrade(url, "head"))
        print(json.dumps(asyncio.run(compare(url, Path(state), sequences))))  # noqa: T201 - what this script is for


if __name__ == "__main__":
    main()
