from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.kit import errors
from services.kit import watch as watch_module
from services.kit.database import Database
from services.kit.events import Event, EventLog, emit
from services.kit.jetstream import Broker, Relay
from services.kit.watch import EventHub, Subscription
from tests.support import NatsServer, eventually, free_port
from tests.unit.kit.test_jetstream import running

_LONG = 20.0
"""Longer than anything here takes: a test that waits for it has failed."""


async def _emit(database: Database, event: str, resource_id: str, **data: object) -> int:
    async with database.transaction() as conn:
        return await emit(conn, event, resource_id, data)


async def _take(subscription: Subscription, count: int) -> list[tuple[str, int]]:
    taken = []
    for _ in range(count):
        event = await subscription.next(_LONG)
        assert event is not None, f"only {taken}"
        taken.append((event.topic, event.sequence))
    return taken


@pytest.fixture
def silent(database: Database) -> EventHub:
    """A hub that is not running: nothing comes but what a test brings."""
    return EventHub(database, Broker("nats://127.0.0.1:1"))


@pytest.fixture
async def hub(database: Database, nats_url: str) -> AsyncIterator[EventHub]:
    broker = Broker(nats_url)
    hub = EventHub(database, broker)
    async with running(broker, hub, Relay(database, broker, {})):
        await broker.client()
        yield hub


async def test_new_events_follow_what_a_client_has_missed(hub: EventHub, database: Database) -> None:
    for _ in range(4):
        await _emit(database, "model:loading", "m_1")
    async with hub.subscribe(["model:m_1"], {"m_1": 2}) as subscription:
        assert await _take(subscription, 2) == [("model:m_1", 3), ("model:m_1", 4)]
        await _emit(database, "model:ready", "m_1")
        await _emit(database, "model:ready", "m_2")
        assert await _take(subscription, 1) == [("model:m_1", 5)]
        assert await subscription.next(0) is None


async def test_a_client_that_names_no_sequence_gets_what_happens_from_now_on(hub: EventHub, database: Database) -> None:
    await _emit(database, "model:loading", "m_1")
    async with hub.subscribe(["model:*"]) as subscription:
        await _emit(database, "model:ready", "m_1")
        assert await _take(subscription, 1) == [("model:m_1", 2)]
        await _emit(database, "model:loading", "m_new")
        assert await _take(subscription, 1) == [("model:m_new", 1)]


async def test_a_sequence_beyond_the_end_hides_nothing_new(hub: EventHub, database: Database) -> None:
    await _emit(database, "model:loading", "m_1")
    async with hub.subscribe(["model:m_1"], {"m_1": 100}) as subscription:
        await _emit(database, "model:ready", "m_1")
        assert await _take(subscription, 1) == [("model:m_1", 2)]


async def test_repeated_and_swapped_messages_are_put_in_order(silent: EventHub, database: Database) -> None:
    async with silent.subscribe(["model:m_1"]) as subscription:
        assert await subscription.next(0) is None
        for _ in range(4):
            await _emit(database, "model:loading", "m_1")
        one, two, three, four = await EventLog(database).after(["model:m_1"], {})
        for event in (one, one, three, two, four, one, three):
            subscription.offer(event)
        assert await _take(subscription, 4) == [("model:m_1", n) for n in (1, 2, 3, 4)]
        assert await subscription.next(0) is None


async def test_a_gap_is_filled_from_the_database(silent: EventHub, database: Database) -> None:
    async with silent.subscribe(["model:m_1"]) as subscription:
        assert await subscription.next(0) is None
        for _ in range(5):
            await _emit(database, "model:loading", "m_1")
        last = (await EventLog(database).after(["model:m_1"], {}))[-1]
        subscription.offer(last)  # NATS lost the four before
        assert await _take(subscription, 5) == [("model:m_1", n) for n in range(1, 6)]


async def test_a_last_event_that_nats_lost_is_found_by_the_next_check(silent: EventHub, database: Database) -> None:
    async with silent.subscribe(["model:*"]) as subscription, silent.subscribe(["training:t_1"]) as other:
        assert await subscription.next(0) is None
        assert await other.next(0) is None
        await _emit(database, "model:ready", "m_1")
        assert await subscription.next(0) is None
        await silent.check()
        assert await _take(subscription, 1) == [("model:m_1", 1)]
        assert await other.next(0) is None


async def test_a_slow_client_costs_bounded_memory_and_loses_nothing(
    silent: EventHub, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_INBOX_LIMIT", 5)
    monkeypatch.setattr(watch_module, "_PAGE", 7)
    async with silent.subscribe(["model:m_1"]) as subscription:
        assert await subscription.next(0) is None
        for _ in range(30):
            await _emit(database, "model:loading", "m_1")
        for event in await EventLog(database).after(["model:m_1"], {}):
            subscription.offer(event)
            assert len(subscription._inbox) <= 5
        assert await _take(subscription, 30) == [("model:m_1", n) for n in range(1, 31)]


async def test_watchers_go_on_while_nats_is_down_and_after_it_lost_its_data(
    database: Database, own_nats: NatsServer
) -> None:
    broker = Broker(own_nats.url)
    hub = EventHub(database, broker)
    async with running(broker, hub, Relay(database, broker, {})):
        await broker.client()
        async with hub.subscribe(["extraction:*"]) as subscription:
            await _emit(database, "extraction:queued", "e_1")
            assert await _take(subscription, 1) == [("extraction:e_1", 1)]
            own_nats.stop()
            await eventually(lambda: not broker.connected)
            for _ in range(20):
                await _emit(database, "extraction:progress", "e_1")
            assert await _take(subscription, 20) == [("extraction:e_1", n) for n in range(2, 22)]
            own_nats.wipe()
            own_nats.start()
            await eventually(lambda: broker.connected)
            await _emit(database, "extraction:completed", "e_1")
            assert await _take(subscription, 1) == [("extraction:e_1", 22)]
        async with hub.subscribe(["extraction:e_1"], {"e_1": 0}) as late:
            assert await _take(late, 22) == [("extraction:e_1", n) for n in range(1, 23)]


async def test_what_nats_swallows_is_seen_all_the_same(hub: EventHub, database: Database, monkeypatch) -> None:
    monkeypatch.setattr(Subscription, "offer", lambda *_: None)
    monkeypatch.setattr(watch_module, "CHECK_SECONDS", _LONG)
    async with hub.subscribe(["model:m_1"]) as subscription:
        await eventually(lambda: _listening(database))
        await _emit(database, "model:loading", "m_1")
        assert await _take(subscription, 1) == [("model:m_1", 1)]


async def test_watchers_work_without_any_broker(database: Database) -> None:
    broker = Broker(f"nats://127.0.0.1:{free_port()}")
    hub = EventHub(database, broker)
    async with running(broker, hub), hub.subscribe(["model:m_1"]) as subscription:
        await eventually(lambda: _listening(database))
        await _emit(database, "model:loading", "m_1")
        assert await _take(subscription, 1) == [("model:m_1", 1)]


async def _listening(database: Database) -> bool:
    return bool(
        await database.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        )
    )


async def test_watchers_survive_a_database_that_drops_every_connection(hub: EventHub, database: Database) -> None:
    async with hub.subscribe(["model:m_1"], {"m_1": 0}) as subscription:
        for _ in range(3):
            await _emit(database, "model:loading", "m_1")
        assert await _take(subscription, 3) == [("model:m_1", n) for n in (1, 2, 3)]
        with pytest.raises(errors.Unavailable):
            async with database.connection() as conn:
                await conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                )
        await _emit(database, "model:ready", "m_1")
        assert await _take(subscription, 1) == [("model:m_1", 4)]


async def test_a_read_that_fails_is_repeated(silent: EventHub, database: Database, monkeypatch) -> None:
    async with silent.subscribe(["model:m_1"]) as subscription:
        assert await subscription.next(0) is None
        await _emit(database, "model:ready", "m_1")
        real, calls = EventLog.after, []

        async def after(self: EventLog, *args: object) -> list[Event]:
            calls.append(args)
            if len(calls) == 1:
                raise errors.Unavailable
            return await real(self, *args)

        monkeypatch.setattr(EventLog, "after", after)
        subscription.look()
        assert await _take(subscription, 1) == [("model:m_1", 1)]
        assert len(calls) == 2


async def test_many_watchers_each_see_everything_in_order(hub: EventHub, database: Database) -> None:
    async def follow(topics: list[str], count: int) -> list[tuple[str, int]]:
        async with hub.subscribe(topics, {f"m_{n}": 0 for n in range(3)}) as subscription:
            return await _take(subscription, count)

    watchers = [asyncio.create_task(follow(["model:*"], 60)) for _ in range(5)]
    watchers += [asyncio.create_task(follow(["model:m_1"], 20)) for _ in range(5)]
    await eventually(lambda: hub.watchers == 10)

    async def write(resource: str) -> None:
        for _ in range(20):
            await _emit(database, "model:loading", resource)

    await asyncio.gather(*(write(f"m_{n}") for n in range(3)))
    for seen in await asyncio.gather(*watchers):
        for resource in {topic for topic, _ in seen}:
            assert [sequence for topic, sequence in seen if topic == resource] == list(range(1, 21))
    assert hub.watchers == 0


async def test_a_malformed_topic_is_refused(silent: EventHub) -> None:
    with pytest.raises(errors.Invalid):
        async with silent.subscribe(["model"]):
            pass
    assert silent.watchers == 0
