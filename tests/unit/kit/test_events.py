from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from services.kit import errors, events
from services.kit.database import Database
from services.kit.events import EventLog, emit


async def _emit(database: Database, event: str, resource_id: str, **data: object) -> int:
    async with database.transaction() as conn:
        return await emit(conn, event, resource_id, data)


async def test_sequences_are_contiguous_per_topic(database: Database) -> None:
    assert [await _emit(database, "model:loading", "m_1") for _ in range(3)] == [1, 2, 3]
    assert await _emit(database, "model:loading", "m_2") == 1
    assert await _emit(database, "model:ready", "m_1") == 4
    assert await EventLog(database).heads(["model:*"]) == {"model:m_1": 4, "model:m_2": 1}


async def test_a_rolled_back_event_leaves_no_gap(database: Database) -> None:
    await _emit(database, "model:loading", "m_1")
    with pytest.raises(RuntimeError):
        async with database.transaction() as conn:
            await emit(conn, "model:failed", "m_1", {})
            raise RuntimeError
    assert await _emit(database, "model:ready", "m_1") == 2
    assert [event.event for event in await EventLog(database).after(["model:m_1"], {})] == [
        "model:loading",
        "model:ready",
    ]


async def test_many_writers_at_once_leave_no_gap_and_no_disorder(database: Database) -> None:
    sequences = await asyncio.gather(*(_emit(database, "model:loading", "m_1", writer=n) for n in range(50)))
    assert sorted(sequences) == list(range(1, 51))
    log = await EventLog(database).after(["model:m_1"], {})
    assert [event.sequence for event in log] == list(range(1, 51))
    assert [event.created_at for event in log] == sorted(event.created_at for event in log)
    assert [event.data["writer"] for event in log] == [sequences.index(n) for n in range(1, 51)]


async def test_events_written_together_are_numbered_in_their_order(database: Database) -> None:
    await _emit(database, "group:switched", "g_1")
    told = [
        ("group:switching", "g_2", {"n": 0}),
        ("group:switching", "g_1", {"n": 1}),
        ("group:switched", "g_1", {"n": 2}),
    ]
    async with database.transaction() as conn:
        assert await events.emit_all(conn, told) == [1, 2, 3]
    log = await EventLog(database).after(["group:*"], {})
    assert [(each.topic, each.sequence, each.data.get("n")) for each in log] == [
        ("group:g_1", 1, None),
        ("group:g_1", 2, 1),
        ("group:g_1", 3, 2),
        ("group:g_2", 1, 0),
    ]
    assert [each.data["n"] for each in sorted(log, key=lambda each: each.position)[1:]] == [0, 1, 2]


async def test_data_carries_sequence_and_time(database: Database) -> None:
    await _emit(database, "model:loading", "m_1", progress=5)
    (event,) = await EventLog(database).after(["model:m_1"], {})
    stamp = event.data["timestamp"]
    assert event.data == {"progress": 5, "sequence": 1, "timestamp": stamp}
    assert stamp.endswith("Z")
    assert abs(datetime.fromisoformat(stamp) - event.created_at) < timedelta(milliseconds=1)


async def test_after_continues_where_a_reader_stopped(database: Database) -> None:
    for n in range(5):
        await _emit(database, "model:loading", "m_1", n=n)
        await _emit(database, "extraction:progress", "e_1", n=n)
    log = EventLog(database)
    page = await log.after(["model:*"], {"model:m_1": 2})
    assert [event.data["n"] for event in page] == [2, 3, 4]
    page = await log.after(["model:m_1", "extraction:e_1"], {"model:m_1": 4, "extraction:e_1": 3})
    assert [(event.topic, event.sequence) for event in page] == [
        ("extraction:e_1", 4),
        ("extraction:e_1", 5),
        ("model:m_1", 5),
    ]
    assert [event.sequence for event in await log.after(["model:m_1"], {}, limit=2)] == [1, 2]
    assert await log.after(["model:m_9"], {}) == []


@pytest.mark.parametrize("topic", ["model", ":m_1", "model:", ""])
async def test_a_malformed_topic_is_named(database: Database, topic: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        await EventLog(database).heads([topic])
    assert caught.value.violations[0][0] == "topics"


async def test_old_events_go_relayed_or_not_but_how_it_ended_stays(database: Database) -> None:
    for what in ("loading", "loading", "ready"):
        await _emit(database, f"model:{what}", "m_1")
    await _emit(database, "model:loading", "m_2")
    await _emit(database, "model:ready", "m_2")
    await database.pool.execute("UPDATE events SET created_at = created_at - interval '8 days'")
    await database.pool.execute("UPDATE events SET relayed_at = clock_timestamp() WHERE resource_id = 'm_1'")
    await _emit(database, "model:loading", "m_3")
    async with database.connection() as conn:
        assert await events.purge(conn) == 3
    left = await EventLog(database).after(["model:*"], {})
    assert [(event.resource_id, event.sequence) for event in left] == [("m_1", 3), ("m_2", 2), ("m_3", 1)]
    assert await _emit(database, "model:unloaded", "m_1") == 4


async def test_the_outbox_tells_its_depth_and_age(database: Database) -> None:
    async with database.connection() as conn:
        assert await events.outbox_depth(conn) == (0, 0.0)
        await _emit(database, "model:loading", "m_1")
        await _emit(database, "model:ready", "m_1")
        await database.pool.execute(
            "UPDATE events SET created_at = created_at - interval '1 minute' WHERE sequence = 1"
        )
        depth, lag = await events.outbox_depth(conn)
        assert depth == 2
        assert lag >= 60
        first, _ = await events.outbox(conn, 10)
        await events.mark_relayed(conn, [first.position])
        assert (await events.outbox_depth(conn))[0] == 1
