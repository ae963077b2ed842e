from __future__ import annotations

import asyncpg
import pytest

from services.kit import errors
from services.kit.database import Database, load_queries, translated_errors


async def test_jsonb_is_read_and_written_as_python_objects(database: Database) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "é"}}
    async with database.transaction() as conn:
        assert await conn.fetchval("SELECT $1::jsonb", value) == value
        assert await conn.fetchval("SELECT jsonb_typeof($1::jsonb)", value) == "object"


async def test_a_failed_transaction_changes_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError):
        async with database.transaction() as conn:
            await conn.execute("INSERT INTO event_streams VALUES ('model:m_1', 'model', 1)")
            raise RuntimeError
    assert await database.pool.fetchval("SELECT count(*) FROM event_streams") == 0


async def test_a_taken_value_names_its_constraint(database: Database) -> None:
    insert = "INSERT INTO event_streams VALUES ('model:m_1', 'model', 1)"
    async with database.transaction() as conn:
        await conn.execute(insert)
    with pytest.raises(errors.AlreadyExists) as caught:
        async with database.transaction() as conn:
            await conn.execute(insert)
    assert caught.value.metadata == {"constraint": "event_streams_pkey"}


async def test_a_dangling_reference_is_a_conflict(database: Database) -> None:
    with pytest.raises(errors.Conflict) as caught:
        async with database.transaction() as conn:
            await conn.execute("INSERT INTO artifact_leases VALUES ('l', 'artifact://a/b', 's', now())")
    assert caught.value.reason == "IN_USE"


async def test_a_terminated_backend_is_unavailable_once_and_the_pool_recovers(database: Database) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        async with database.transaction() as conn:
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert (caught.value.reason, caught.value.transient) == ("DATABASE_UNAVAILABLE", True)
    async with database.transaction() as conn:
        assert await conn.fetchval("SELECT 1") == 1


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.AdminShutdownError("terminating connection"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        asyncpg.TooManyConnectionsError("too many clients"),
        asyncpg.DeadlockDetectedError("deadlock detected"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress"),
        ConnectionResetError(),
        TimeoutError(),
    ],
)
def test_an_outage_has_one_name(error: Exception) -> None:
    with pytest.raises(errors.Unavailable) as caught, translated_errors():
        raise error
    assert (caught.value.reason, caught.value.transient) == ("DATABASE_UNAVAILABLE", True)


@pytest.mark.parametrize("error", [ValueError(), asyncpg.UndefinedTableError("x"), errors.NotFound(), OSError(28, "x")])
def test_what_is_not_an_outage_keeps_its_name(error: Exception) -> None:
    with pytest.raises(type(error)), translated_errors():
        raise error


@pytest.mark.parametrize("dsn", ["postgresql://u@127.0.0.1:1/x", "postgresql://u@/x?host=/nonexistent"])
async def test_nobody_listening_is_unavailable(dsn: str) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        await Database.open(dsn)
    assert caught.value.reason == "DATABASE_UNAVAILABLE"


async def test_a_closed_database_is_unavailable(database_url: str) -> None:
    database = await Database.open(database_url)
    pool = database.pool
    await database.close()
    with pytest.raises(errors.Unavailable), translated_errors():
        await pool.fetchval("SELECT 1")


async def test_a_programmer_error_is_not_called_an_outage(database: Database) -> None:
    with pytest.raises(asyncpg.InterfaceError):
        async with database.transaction() as conn:
            await conn.fetchval("SELECT $1::int", 1, 2)


def test_queries_are_found_by_name(tmp_path) -> None:
    (tmp_path / "queries.sql").write_text("-- one --\nSELECT 1\n\n-- two --\n-- why\nSELECT 2;\n")
    assert load_queries(str(tmp_path / "x.py")) == {"one": "SELECT 1", "two": "-- why\nSELECT 2;"}


def test_a_query_name_that_stands_twice_is_refused(tmp_path) -> None:
    (tmp_path / "queries.sql").write_text("-- one --\nSELECT 1\n-- one --\nSELECT 2\n")
    with pytest.raises(ValueError, match="one is defined twice"):
        load_queries(str(tmp_path / "x.py"))
