from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg
import pytest

from services.kit import errors, migrate
from services.kit.database import Database

_SCHEMA = """
SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2
"""
_INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1"


async def _shape(dsn: str) -> list[tuple]:
    conn = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for query in (_SCHEMA, _INDEXES) for row in await conn.fetch(query)]
    finally:
        await conn.close()


async def test_up_down_up_leaves_the_same_schema_with_data_in_it(empty_database_url: str) -> None:
    dsn = empty_database_url
    assert await migrate.current(dsn) is None
    await migrate.upgrade(dsn)
    assert await migrate.current(dsn) == migrate.head()
    first = await _shape(dsn)
    conn = await asyncpg.connect(dsn)
    await conn.execute(
        "INSERT INTO jobs (id, kind, payload, resource_id, event_prefix, created_by)"
        " VALUES ('job_1','k','{}','r','p','u')"
    )
    await conn.execute(
        "INSERT INTO events (topic, sequence, event, resource_id, data) VALUES ('p:r', 1, 'p:x', 'r', '{}')"
    )
    await conn.close()

    await migrate.downgrade(dsn, "base")
    assert await migrate.current(dsn) is None
    assert await _shape(dsn) == []

    await migrate.upgrade(dsn)
    assert await _shape(dsn) == first


async def test_every_revision_can_be_taken_back_alone(empty_database_url: str) -> None:
    dsn = empty_database_url
    shapes = [("base", await _shape(dsn))]
    versions = Path(migrate.__file__).parent / "migrations" / "versions"
    for revision in sorted(path.stem for path in versions.glob("0*.py")):
        await migrate.upgrade(dsn, revision)
        assert await migrate.current(dsn) == revision
        shapes.append((revision, await _shape(dsn)))
    for revision, shape in reversed(shapes[:-1]):
        await migrate.downgrade(dsn, revision)
        assert await _shape(dsn) == shape, f"the way back to {revision} leaves something else"


async def test_two_processes_that_migrate_at_once_take_turns(empty_database_url: str) -> None:
    code = f"import asyncio; from services.kit import migrate; asyncio.run(migrate.upgrade({empty_database_url!r}))"
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", code) for _ in range(2)]
    assert [await process.wait() for process in processes] == [0, 0]
    assert await migrate.current(empty_database_url) == migrate.head()


async def test_services_refuse_another_schema(empty_database_url: str) -> None:
    database = await Database.open(empty_database_url)
    try:
        with pytest.raises(errors.Unavailable) as caught:
            await migrate.require_head(database)
        assert caught.value.metadata == {"found": "", "needed": migrate.head()}
        await migrate.upgrade(empty_database_url)
        await migrate.require_head(database)
    finally:
        await database.close()


async def test_no_server_is_unavailable() -> None:
    with pytest.raises(errors.Unavailable):
        await migrate.upgrade("postgresql://u@127.0.0.1:1/x")
