"""Following events: from the database up to now, then from NATS as they come; the database fills every gap."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

from services.kit import errors, events
from services.kit.database import Database
from services.kit.events import Event, EventLog, split_topics
from services.kit.jetstream import Broker
from services.kit.waiting import Backoff, wait_for

GRACE_SECONDS = 0.5
"""How long NATS may take before a watcher looks for an event in the database."""
CHECK_SECONDS = 5.0
"""How often all watchers are compared with the database, in case a notification was lost as well."""

_INBOX_LIMIT = 1000
_PAGE = 500


class EventHub:
    """All watchers of a process share one tail of NATS and one ear at the database."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self._database = database
        self._broker = broker
        self._log = EventLog(database)
        self._subscriptions: set[Subscription] = set()

    async def run(self) -> None:
        """Serve the watchers until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_broker())
            group.create_task(self._follow_database())
            group.create_task(self._check())

    @asynccontextmanager
    async def subscribe(
        self, topics: Iterable[str], after: Mapping[str, int] | None = None
    ) -> AsyncIterator[Subscription]:
        """Follow topics: every event once, each topic in the order of its sequence, without a gap.

        Args:
            topics: `<prefix>:<resource id>` or `<prefix>:*`.
            after: resource id to the last sequence that the client has seen; of other resources it gets what happens
                from now on.

        Raises:
            errors.Invalid: a malformed topic.
            errors.Unavailable: the database does not answer.
        """
        subscription = Subscription(self._log, topics)
        self._subscriptions.add(subscription)  # first, so that nothing falls between the heads and the tail
        try:
            await subscription.start(after or {})
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    @property
    def watchers(self) -> int:
        """How many follow now."""
        return len(self._subscriptions)

    async def _follow_broker(self) -> None:
        async for event in self._broker.tail():
            for subscription in self._interested(event.topic):
                subscription.offer(event)

    async def _follow_database(self) -> None:
        """PostgreSQL's own notifications say what must have come by now; at once while NATS is known to be away."""
        loop = asyncio.get_running_loop()

        def notified(_conn: object, _pid: int, _channel: str, payload: str) -> None:
            topic, _, sequence = payload.rpartition(" ")
            for subscription in self._interested(topic):
                grace = GRACE_SECONDS if self._broker.connected else 0.0
                loop.call_later(grace, subscription.compare, {topic: int(sequence)})

        backoff = Backoff(0.5, 10.0)
        while True:
            try:
                async with self._database.dedicated() as conn:
                    closed = asyncio.Event()
                    conn.add_termination_listener(lambda _conn, closed=closed: closed.set())
                    await conn.add_listener(events.CHANNEL, notified)
                    backoff.reset()
                    await closed.wait()
            except errors.Unavailable:
                pass
            await asyncio.sleep(backoff.next())

    async def _check(self) -> None:
        """Neither NATS nor a notification is a promise: compare with the database now and then."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            with suppress(errors.Unavailable):
                await self.check()

    async def check(self) -> None:
        """Compare all watchers with the database now.

        Raises:
            errors.Unavailable: the database does not answer.
        """
        topics = {topic for subscription in self._subscriptions for topic in subscription.topics}
        heads = await self._log.heads(topics) if topics else {}
        for subscription in self._subscriptions:
            subscription.compare(heads)

    def _interested(self, topic: str) -> list[Subscription]:
        return [subscription for subscription in self._subscriptions if subscription.wants(topic)]


class Subscription:
    """One watcher's place in its topics."""

    def __init__(self, log: EventLog, topics: Iterable[str]) -> None:
        self._log = log
        self.topics = list(topics)
        self._exact, self._prefixes = map(set, split_topics(self.topics))
        self._cursors: dict[str, int] = {}
        self._ready: deque[Event] = deque()
        self._inbox: deque[Event] = deque()
        self._behind = False
        self._signal = asyncio.Event()
        self._backoff = Backoff(0.2, 5.0)

    async def start(self, after: Mapping[str, int]) -> None:
        """Take a place: after what the client has seen, else after what has happened so far."""
        heads = await self._log.heads(self.topics)
        self._cursors = {topic: min(head, after.get(_resource(topic), head)) for topic, head in heads.items()}
        self._behind = True

    async def next(self, timeout: float) -> Event | None:
        """The next event, or None when there is none within `timeout` seconds; a database that is away only delays."""
        deadline = asyncio.get_running_loop().time() + timeout
        while not self._ready:
            self._signal.clear()
            if self._behind:
                delay = await self._read()
            else:
                self._sort()
                delay = None
            if self._ready or (self._behind and delay is None):
                continue
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return None
            await wait_for(self._signal, left if delay is None else min(left, delay))
        return self._ready.popleft()

    def wants(self, topic: str) -> bool:
        """Whether the topic is one of its own."""
        return topic in self._exact or topic.partition(":")[0] in self._prefixes

    def offer(self, event: Event) -> None:
        """NATS brought an event."""
        if len(self._inbox) < _INBOX_LIMIT:
            self._inbox.append(event)
        else:
            # A slow client costs bounded memory; what it has not taken it gets from the database, in its own time.
            self._inbox.clear()
            self._behind = True
        self._signal.set()

    def look(self) -> None:
        """There may be something in the database."""
        self._behind = True
        self._signal.set()

    def compare(self, heads: Mapping[str, int]) -> None:
        """The database's last sequences; those of other watchers' topics may be among them."""
        if any(head > self._cursors.get(topic, 0) and self.wants(topic) for topic, head in heads.items()):
            self.look()

    async def _read(self) -> float | None:
        """Take a page from the database; returns how long to wait before trying again when it does not answer."""
        self._behind = False
        try:
            page = await self._log.after(self.topics, self._cursors, _PAGE)
        except errors.Unavailable:
            self._behind = True
            return self._backoff.next()
        self._backoff.reset()
        for event in page:
            self._accept(event)
        self._behind = self._behind or len(page) == _PAGE
        return None

    def _sort(self) -> None:
        """Take what NATS brought as far as it follows on; a gap sends us to the database."""
        while self._inbox:
            event = self._inbox.popleft()
            last = self._cursors.get(event.topic, 0)
            if event.sequence == last + 1:
                self._accept(event)
            elif event.sequence > last:
                self._behind = True

    def _accept(self, event: Event) -> None:
        self._cursors[event.topic] = event.sequence
        self._ready.append(event)


def _resource(topic: str) -> str:
    return topic.partition(":")[2]
