from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import nats
import pytest
from lensmesh.events.v1 import events_pb2

from services.kit import errors, events
from services.kit.database import Database
from services.kit.events import EventLog, emit
from services.kit.jetstream import RELAY_LOCK, STREAM, Broker, Relay, from_message, subject_of, to_message
from tests.support import NatsServer, eventually, free_port

OWNERS = {"model": "registry"}


@asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    """Each part's `run` runs within the block."""
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def _emit(database: Database, event: str, resource_id: str, **data: object) -> int:
    async with database.transaction() as conn:
        return await emit(conn, event, resource_id, data)


async def _drained(database: Database) -> bool:
    async with database.connection() as conn:
        return (await events.outbox_depth(conn))[0] == 0


async def _stored(url: str) -> list[tuple[str, dict[str, str], events_pb2.Event]]:
    """Subject, headers and body of everything in the stream."""
    async with await nats.connect(url) as client:
        js = client.jetstream()
        last = (await js.stream_info(STREAM)).state.messages
        subscription = await js.subscribe("lensmesh.v1.>", ordered_consumer=True)
        messages = [await subscription.next_msg() for _ in range(last)]
        return [(m.subject, m.headers, events_pb2.Event.FromString(m.data)) for m in messages]


async def test_committed_events_arrive_in_jetstream(database: Database, own_nats: NatsServer) -> None:
    broker = Broker(own_nats.url)
    async with running(broker, Relay(database, broker, OWNERS)):
        await _emit(database, "model:loading", "m_1", progress=5, job_id="job_1")
        await _emit(database, "extraction:progress", "ext.1", samples_processed=3)
        await eventually(lambda: _drained(database))
        (first, headers, loading), (second, _, progress) = await _stored(own_nats.url)
        async with await nats.connect(own_nats.url) as client:
            config = (await client.jetstream().stream_info(STREAM)).config
    assert first == "lensmesh.v1.registry.model.m_1.loading"
    assert second == "lensmesh.v1.extraction.extraction.ext_1.progress"
    assert headers["Nats-Msg-Id"] == "model:m_1:1"
    assert (loading.event, loading.resource_id, loading.sequence, loading.job_id) == (
        "model:loading",
        "m_1",
        1,
        "job_1",
    )
    assert dict(loading.data)["progress"] == 5
    assert progress.resource_id == "ext.1"
    assert (config.subjects, config.max_age) == (["lensmesh.v1.>"], 7 * 86400)


async def test_a_message_carries_the_whole_event(database: Database) -> None:
    await _emit(database, "model:loading", "m_1", progress=5.5, nested={"list": [1, None, "x"]}, job_id="job_1")
    (event,) = await EventLog(database).after(["model:m_1"], {})
    assert from_message(to_message(event)) == event
    assert subject_of(event, OWNERS) == "lensmesh.v1.registry.model.m_1.loading"


async def test_an_event_relayed_twice_is_stored_once(database: Database, own_nats: NatsServer) -> None:
    broker = Broker(own_nats.url)
    await _emit(database, "model:loading", "m_1")
    async with running(broker, Relay(database, broker, OWNERS)):
        await eventually(lambda: _drained(database))
        await database.pool.execute("UPDATE events SET relayed_at = NULL")  # a crash before the row was marked
        await _emit(database, "model:ready", "m_1")
        await eventually(lambda: _drained(database))
        assert [body.event for *_, body in await _stored(own_nats.url)] == ["model:loading", "model:ready"]


async def test_one_process_relays_at_a_time_and_another_takes_over(database: Database, own_nats: NatsServer) -> None:
    broker = Broker(own_nats.url)
    held = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = $1 AND granted"
    async with running(broker), AsyncExitStack() as first:
        await first.enter_async_context(running(Relay(database, broker, OWNERS)))
        holder = await eventually(lambda: database.pool.fetchval(held, RELAY_LOCK))
        async with running(Relay(database, broker, OWNERS, standby_seconds=0.02)):
            await _emit(database, "model:loading", "m_1")
            await eventually(lambda: _drained(database))
            assert await database.pool.fetchval(held, RELAY_LOCK) == holder
            await first.aclose()
            await _emit(database, "model:ready", "m_1")
            await eventually(lambda: _drained(database))
            assert len(await _stored(own_nats.url)) == 2


async def test_events_wait_for_a_broker_that_is_away_and_lost_its_data(
    database: Database, own_nats: NatsServer
) -> None:
    broker = Broker(own_nats.url)
    async with running(broker, Relay(database, broker, OWNERS)):
        await _emit(database, "model:loading", "m_1")
        await eventually(lambda: _drained(database))
        own_nats.stop()
        await eventually(lambda: not broker.connected)
        with pytest.raises(errors.Unavailable) as caught:
            await broker.ping()
        assert caught.value.reason == "BROKER_UNAVAILABLE"
        for n in range(3):
            await _emit(database, "model:loading", "m_1", n=n)
        own_nats.wipe()
        own_nats.start()
        await eventually(lambda: _drained(database))
        await broker.ping()
        assert [body.sequence for *_, body in await _stored(own_nats.url)] == [2, 3, 4]


async def test_a_terminated_database_connection_does_not_stop_the_relay(
    database: Database, own_nats: NatsServer
) -> None:
    broker = Broker(own_nats.url)
    async with running(broker, Relay(database, broker, OWNERS)):
        await _emit(database, "model:loading", "m_1")
        await eventually(lambda: _drained(database))
        await database.pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = $1", RELAY_LOCK
        )
        await _emit(database, "model:ready", "m_1")
        await eventually(lambda: _drained(database))


async def test_an_event_too_large_for_nats_does_not_block_the_others(database: Database, own_nats: NatsServer) -> None:
    broker = Broker(own_nats.url)
    async with running(broker, Relay(database, broker, OWNERS)):
        await _emit(database, "model:loading", "m_1", text="x" * 2_000_000)
        await _emit(database, "model:ready", "m_1")
        await eventually(lambda: _drained(database))
        assert [body.sequence for *_, body in await _stored(own_nats.url)] == [2]


async def test_tail_gives_the_events_of_its_topics(database: Database, own_nats: NatsServer) -> None:
    broker = Broker(own_nats.url)
    async with running(broker, Relay(database, broker, OWNERS)):
        tail = broker.tail(["model:*", "extraction:e.1"])
        seen = asyncio.create_task(_take(tail, 2))
        await eventually(lambda: _subscribed(broker, 2))
        await _emit(database, "training:progress", "t_1")
        await _emit(database, "extraction:progress", "e_2")
        await _emit(database, "model:loading", "m_1")
        await _emit(database, "extraction:progress", "e.1")
        assert [event.topic for event in await seen] == ["model:m_1", "extraction:e.1"]
        await tail.aclose()


async def _take(tail: AsyncIterator[events.Event], count: int) -> list[events.Event]:
    return [await anext(tail) for _ in range(count)]


async def _subscribed(broker: Broker, count: int) -> bool:
    return len((await broker.client())._subs) >= count


async def test_a_broker_that_was_never_there_is_said_and_found_later(database: Database) -> None:
    port = free_port()
    broker = Broker(f"nats://127.0.0.1:{port}")
    async with running(broker):
        with pytest.raises(errors.Unavailable):
            await broker.ping()
