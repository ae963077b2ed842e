"""NATS: committed events go out as hints, and come in as the fast way to see them; the database stays the truth."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC
from typing import Any

import asyncpg
import nats.errors
import structlog
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from lensmesh.events.v1 import events_pb2
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from services.kit import errors, events
from services.kit.database import Database
from services.kit.events import Event
from services.kit.waiting import Backoff, wait_for

STREAM = "LENSMESH_EVENTS"
RELAY_LOCK = 0x72656C61
"""Key of the advisory lock that the one relaying process holds."""

_SUBJECT_ROOT = "lensmesh.v1"
_TRY_LOCK = "SELECT pg_try_advisory_lock($1)"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_BATCH = 200
_ACK_SECONDS = 2.0
_POLL_SECONDS = 5.0
_TAIL_LIMIT = 10_000

_log = structlog.get_logger(__name__)


def to_message(event: Event) -> events_pb2.Event:
    """The event as every client gets it."""
    message = events_pb2.Event(
        event=event.event,
        resource_id=event.resource_id,
        sequence=event.sequence,
        job_id=event.data.get("job_id", ""),
        position=event.position,
    )
    message.timestamp.FromDatetime(event.created_at)
    message.data.update(event.data)
    return message


def from_message(message: events_pb2.Event) -> Event:
    """The event of a message; numbers of its data are floats, as everywhere in protobuf's JSON."""
    return Event(
        event=message.event,
        resource_id=message.resource_id,
        sequence=message.sequence,
        created_at=message.timestamp.ToDatetime(tzinfo=UTC),
        data=MessageToDict(message.data),
        position=message.position,
    )


def subject_of(event: Event, owners: Mapping[str, str]) -> str:
    """`lensmesh.v1.<service>.<prefix>.<resource id>.<what>`; characters that NATS forbids in a token become `_`.

    Args:
        event: the event.
        owners: which service writes the events of a prefix; a prefix that it does not name is its own.
    """
    prefix, _, what = event.event.partition(":")
    return ".".join((_SUBJECT_ROOT, owners.get(prefix, prefix), prefix, _token(event.resource_id), what))


class Broker:
    """One connection to NATS that comes back whenever the server does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = Client()
        self._connected = asyncio.Event()

    async def run(self) -> None:
        """Connect, and stay so, until cancelled."""

        async def up() -> None:
            self._connected.set()
            _log.info("broker connected")

        async def down() -> None:
            self._connected.clear()
            _log.warning("broker lost")

        async def failed(error: Exception) -> None:
            _log.debug("broker error", error=type(error).__name__)

        try:
            await self._client.connect(
                servers=[self._url],
                reconnected_cb=up,
                disconnected_cb=down,
                error_cb=failed,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
            )
            await up()
            await asyncio.Event().wait()
        finally:
            self._connected.clear()
            if self._client.is_connected:
                await self._client.close()

    @property
    def connected(self) -> bool:
        """Whether the server answers."""
        return self._connected.is_set()

    async def ping(self) -> None:
        """Check that the server answers.

        Raises:
            errors.Unavailable: `BROKER_UNAVAILABLE`.
        """
        if not self.connected:
            raise errors.Unavailable("NATS does not answer; events come late", reason="BROKER_UNAVAILABLE")

    async def client(self) -> Client:
        """The connection, as soon as there is one."""
        await self._connected.wait()
        return self._client

    async def tail(self, topics: Iterable[str] = ("*:*",)) -> AsyncIterator[Event]:
        """Events from now on, as they are relayed; also after the connection broke and came back.

        It may lack some (a reader that is too slow, a broker that was away) and repeat some: compare sequences.

        Args:
            topics: `<prefix>:<resource id>`, `<prefix>:*` or `*:*`.
        """
        client = await self.client()
        queue: asyncio.Queue[bytes] = asyncio.Queue(_TAIL_LIMIT)

        async def receive(message: Msg) -> None:
            if not queue.full():
                queue.put_nowait(message.data)

        subscriptions = [await client.subscribe(_pattern(topic), cb=receive) for topic in topics]
        try:
            while True:
                body = await queue.get()
                try:
                    yield from_message(events_pb2.Event.FromString(body))
                except DecodeError:
                    _log.warning("foreign message under our subjects", size=len(body))
        finally:
            for subscription in subscriptions:
                if client.is_connected:
                    await subscription.unsubscribe()


class Relay:
    """Moves events from the outbox to JetStream; of all processes that run one, one at a time does."""

    def __init__(
        self, database: Database, broker: Broker, owners: Mapping[str, str], *, standby_seconds: float = 5.0
    ) -> None:
        """Describe the relay; `run` starts it.

        Args:
            database: where the outbox is.
            broker: where the events go.
            owners: see `subject_of`.
            standby_seconds: how often to ask whether the process that relays is gone.
        """
        self._database = database
        self._broker = broker
        self._owners = owners
        self._standby_seconds = standby_seconds
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Relay until cancelled; while the broker or the database is away, try again ever more slowly."""
        backoff = Backoff(0.5, 30.0)
        while True:
            try:
                client = await self._broker.client()
                async with self._database.dedicated() as conn:
                    while not await conn.fetchval(_TRY_LOCK, RELAY_LOCK):  # noqa: ASYNC110 - another process holds it
                        await asyncio.sleep(self._standby_seconds)
                    conn.add_termination_listener(lambda _conn: self._wake.set())
                    await conn.add_listener(events.CHANNEL, lambda *_: self._wake.set())
                    await self._relay(client.jetstream(timeout=_ACK_SECONDS), conn, backoff)
            except (errors.Unavailable, nats.errors.Error, TimeoutError) as error:
                _log.warning("relay interrupted", error=type(error).__name__)
                await asyncio.sleep(backoff.next())

    async def _relay(self, js: JetStreamContext, lock_holder: asyncpg.Connection, backoff: Backoff) -> None:
        await _ensure_stream(js)
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # Python 3.11's wait_for, in nats, may have swallowed it
            raise asyncio.CancelledError
        while not lock_holder.is_closed():
            self._wake.clear()
            async with self._database.transaction() as conn:
                batch = await events.outbox(conn, _BATCH)
            if batch:
                await self._publish(js, batch)
                async with self._database.transaction() as conn:
                    await events.mark_relayed(conn, [event.position for event in batch])
            backoff.reset()
            if len(batch) < _BATCH:
                await wait_for(self._wake, _POLL_SECONDS)

    async def _publish(self, js: JetStreamContext, batch: list[Event]) -> None:
        acks: list[asyncio.Future[Any]] = []
        try:
            for event in batch:
                headers = {"Nats-Msg-Id": f"{event.topic}:{event.sequence}"}
                body = to_message(event).SerializeToString()
                try:
                    ack = await js.publish_async(subject_of(event, self._owners), body, headers=headers)
                except nats.errors.MaxPayloadError:
                    _log.error("event too large for the broker; watchers get it from the database", topic=event.topic)
                    continue
                acks.append(ack)
            async with asyncio.timeout(_ACK_SECONDS):
                await asyncio.gather(*acks)
        finally:
            for ack in acks:
                ack.cancel()


async def _ensure_stream(js: JetStreamContext) -> None:
    try:
        await js.stream_info(STREAM)
    except js_errors.NotFoundError:
        await js.add_stream(
            StreamConfig(
                name=STREAM,
                subjects=[f"{_SUBJECT_ROOT}.>"],
                max_age=events.RETENTION.total_seconds(),
                storage=StorageType.FILE,
                discard=DiscardPolicy.OLD,
                duplicate_window=120,
            )
        )


def _token(text: str) -> str:
    return _UNSAFE.sub("_", text)


def _pattern(topic: str) -> str:
    prefix, _, resource = topic.partition(":")
    return f"{_SUBJECT_ROOT}.*.{prefix}.{resource if resource == '*' else _token(resource)}.*"
