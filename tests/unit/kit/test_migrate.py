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


_ROWS = """
INSERT INTO models (id, name, model_type, source, model_identifier, created_by, status, wanted)
VALUES ('m_1', 'm', 'gpt2', 'local', 'm', 'u', 'ready', true),
    ('m_2', 'm', 'gpt2', 'local', 'm', 'u', 'unloaded', true);
INSERT INTO datasets (id, name, source, identifier, split, text_field, size_bytes, created_by)
VALUES ('ds_1', 'd', 'inline', '', 'train', 'text', 3, 'u');
INSERT INTO dataset_texts (dataset_id, ordinal, text) VALUES ('ds_1', 0, 'abc');
INSERT INTO hosts (host_id, incarnation, address, device, kind, total_bytes, budget_bytes, services)
VALUES ('h_1', 'i', 'a', 'cpu', 'cpu', 100, 80, '{registry}');
INSERT INTO residencies (model_id, host_id, state, quantization, required_bytes, charge_bytes)
VALUES ('m_1', 'h_1', 'resident', 'none', 10, 10), ('m_2', 'h_1', 'parked', 'none', 10, 0);
INSERT INTO groups (id, name, model_id, active_lens_id, created_by, exclusive)
VALUES ('g_1', 'g', 'm_1', 'l_1', 'u', true);
INSERT INTO lenses (id, group_id, kind, created_by)
VALUES ('l_1', 'g_1', 'text_lens', 'u'), ('l_2', 'g_1', 'tuned_lens', 'u'), ('l_3', 'g_1', 'tuned_lens', 'u');
INSERT INTO lens_residencies (lens_id, model_id, host_id, charge_bytes, state)
VALUES ('l_1', 'm_1', 'h_1', 2, 'here'), ('l_2', 'm_1', 'h_1', 0, 'leaving'),
    ('l_3', 'm_1', 'h_1', 3, 'parked');
"""


async def test_the_way_back_and_forth_keeps_what_the_registry_knows(empty_database_url: str) -> None:
    dsn = empty_database_url
    await migrate.upgrade(dsn)
    conn = await asyncpg.connect(dsn)
    await conn.execute(_ROWS)
    kept = "SELECT id, status, wanted FROM models ORDER BY id", "SELECT id, kind, group_id FROM lenses ORDER BY id"
    before = [await conn.fetch(query) for query in kept]
    await migrate.downgrade(dsn, "0002_registry")
    assert [await conn.fetch(query) for query in kept] == before
    assert await conn.fetchval("SELECT state FROM residencies WHERE model_id = 'm_1'") == "resident"
    await migrate.upgrade(dsn)
    assert [await conn.fetch(query) for query in kept] == before
    assert await conn.fetchval("SELECT text FROM dataset_texts") == "abc"
    assert await conn.fetchval("SELECT sum(charge_bytes) FROM residencies JOIN hosts USING (host_id)") == 10
    await conn.close()


_SPEC_003 = """
id name model_type architecture source config quantization status progress memory_usage_bytes load_time_seconds
parameter_count hidden_size num_layers vocab_size cache_dir model_path error_message error_code created_at loaded_at
last_used_at updated_at
"""
"""Columns of its section 4."""
_INDEXED = {
    "idx_models_status": "(status)",
    "idx_models_model_type": "(model_type)",
    "idx_models_source": "(source)",
    "idx_models_created_at": "(created_at DESC, id DESC)",
    "idx_models_last_used_at": "(last_used_at DESC)",
    "idx_models_ready": "(status, model_type) WHERE ((status)::text = 'ready'::text)",
}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE models SET status = 'gone'",
        "UPDATE models SET source = 'ftp'",
        "UPDATE models SET quantization = 'int3'",
        "UPDATE models SET progress = 101",
    ],
)
async def test_models_have_the_columns_checks_and_indexes_of_spec_003(database: Database, change: str) -> None:
    async with database.connection() as conn:
        columns = await conn.fetch("SELECT column_name FROM information_schema.columns WHERE table_name = 'models'")
        assert set(_SPEC_003.split()) <= {row["column_name"] for row in columns}
        indexes = await conn.fetch("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'models'")
        found = {row["indexname"]: row["indexdef"].partition(" USING btree ")[2] for row in indexes}
        assert found == {**_INDEXED, "models_pkey": "(id)"}
        await conn.execute(_ROWS)
        with pytest.raises(asyncpg.CheckViolationError):
            await conn.execute(change)


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
