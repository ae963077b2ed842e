"""Metadata reads through gRPC with 10,000 registered models, against the bare query.

python -m tests.bench.registry [--models 10000] [--calls 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from lensmesh.registry.v1 import models_pb2
from rich.console import Console
from rich.table import Table

from services.kit import migrate
from services.kit.database import Database
from tests import support
from tests.wire.registry_support import FakeHost, Mesh, running

_COPIES = """
INSERT INTO models (id, name, model_type, source, model_identifier, config, created_by, created_at, model_path)
SELECT id || '_' || n, name || n, model_type, source, model_identifier, config, created_by,
       created_at - n * interval '1 second', model_path
FROM models, generate_series(1, $1) n
"""


async def median(calls: int, call: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


async def measure(mesh: Mesh, count: int, calls: int) -> list[tuple[str, float]]:
    await mesh.add_host(FakeHost())
    first = await mesh.create()
    async with mesh.database.connection() as conn:
        await conn.execute(_COPIES, count - 1)
        await conn.execute("ANALYZE models")
    ids = [first.id, *(f"{first.id}_{n}" for n in range(1, count))]
    chance = random.Random(0)

    async def query() -> None:
        async with mesh.database.connection() as conn:
            await conn.fetchrow("SELECT * FROM models WHERE id = $1", chance.choice(ids))

    async def page() -> None:
        offset = chance.randrange(count - 50)
        await mesh.models.ListModels(models_pb2.ListModelsRequest(limit=50, offset=offset))

    return [
        ("floor: the row by its key", await median(calls, query)),
        ("GetModel", await median(calls, lambda: mesh.get(chance.choice(ids)))),
        ("ListModels, 50 anywhere", await median(calls // 4, page)),
    ]


async def bench(count: int, calls: int) -> list[tuple[str, float]]:
    with support.postgres_server() as dsn, support.nats_server() as nats, tempfile.TemporaryDirectory() as folder:
        await support.execute(dsn.format("postgres"), "CREATE DATABASE bench")
        await migrate.upgrade(dsn.format("bench"), "head")
        database = await Database.open(dsn.format("bench"), min_size=1, max_size=8)
        async with running(database, Path(folder), nats.url) as mesh:
            rows = await measure(mesh, count, calls)
        await database.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=2000)
    given = parser.parse_args()
    table = Table("call", "median ms", title=f"{given.models} models")
    for name, milliseconds in asyncio.run(bench(given.models, given.calls)):
        table.add_row(name, f"{milliseconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
