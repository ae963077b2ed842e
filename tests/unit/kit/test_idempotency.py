from __future__ import annotations

import asyncio

import pytest

from services.kit import errors
from services.kit.database import Database
from services.kit.idempotency import idempotent, purge
from services.kit.requests import RequestKey


async def _create(
    database: Database, request_id: str = "r1", body: bytes = b"{}", caller: str = "ada", method: str = "Create"
) -> dict:
    """A create as a service writes it; the "resource" is a row of event_streams."""
    async with (
        database.transaction() as conn,
        idempotent(conn, RequestKey(caller, method, request_id, body)) as request,
    ):
        if request.answer is None:
            number = await conn.fetchval(
                "INSERT INTO event_streams SELECT 'm:' || count(*), 'm', 1 FROM event_streams RETURNING topic"
            )
            request.answer = {"id": number}
    return request.answer


async def _resources(database: Database) -> int:
    return await database.pool.fetchval("SELECT count(*) FROM event_streams")


async def test_the_same_request_gets_the_first_answer(database: Database) -> None:
    first = await _create(database)
    assert await _create(database) == first
    assert await _resources(database) == 1


async def test_another_body_under_the_same_id_is_refused(database: Database) -> None:
    await _create(database)
    with pytest.raises(errors.Conflict) as caught:
        await _create(database, body=b'{"name": "x"}')
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert await _resources(database) == 1


@pytest.mark.parametrize("other", [{"caller": "bob"}, {"method": "Start"}, {"request_id": "r2"}])
async def test_ids_belong_to_one_caller_and_method(database: Database, other: dict) -> None:
    first = await _create(database)
    assert await _create(database, body=b"other", **other) != first


async def test_without_an_id_every_request_counts(database: Database) -> None:
    await _create(database, request_id="")
    await _create(database, request_id="")
    assert await _resources(database) == 2


async def test_twenty_at_once_make_one_resource(database: Database) -> None:
    answers = await asyncio.gather(*(_create(database) for _ in range(20)))
    assert answers == [answers[0]] * 20
    assert await _resources(database) == 1


async def test_a_crash_before_the_reply_leaves_both_or_neither(database: Database) -> None:
    with pytest.raises(errors.Unavailable):
        async with (
            database.transaction() as conn,
            idempotent(conn, RequestKey("ada", "Create", "r1", b"{}")) as request,
        ):
            await conn.execute("INSERT INTO event_streams VALUES ('m:lost', 'm', 1)")
            request.answer = {"id": "m:lost"}
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert await _resources(database) == 0
    assert await _create(database) == {"id": "m:0"}
    assert await _create(database) == {"id": "m:0"}


async def test_a_failed_create_is_not_remembered(database: Database) -> None:
    with pytest.raises(errors.NotFound):
        async with (
            database.transaction() as conn,
            idempotent(conn, RequestKey("ada", "Create", "r1", b"{}")),
        ):
            raise errors.NotFound
    assert await _create(database, body=b"corrected") == {"id": "m:0"}


async def test_requests_are_forgotten_after_a_day(database: Database) -> None:
    await _create(database, request_id="old")
    await database.pool.execute("UPDATE idempotent_requests SET created_at = created_at - interval '25 hours'")
    await _create(database, request_id="new")
    async with database.connection() as conn:
        assert await purge(conn) == 1
    assert await _create(database, request_id="old", body=b"other") == {"id": "m:2"}
