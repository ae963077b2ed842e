"""lensmesh.registry.v1.EventService, and the feeds behind every watch: a snapshot, events, heartbeats."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from google.protobuf.message import Message
from lensmesh.events.v1 import events_pb2
from lensmesh.registry.v1 import jobs_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2_grpc

from services.kit.events import topic_of
from services.kit.jetstream import to_message
from services.kit.jobs import Job, JobStore
from services.kit.watch import EventHub
from services.registry.wire import to_json

HEARTBEAT_SECONDS = 15.0


class Feeds:
    """Streams of events for one client each; a heartbeat when nothing happened for 15 s."""

    def __init__(self, hub: EventHub, jobs: JobStore) -> None:
        self._hub = hub
        self._jobs = jobs

    async def of_topics(self, topics: list[str], after: Mapping[str, int]) -> AsyncIterator[events_pb2.Event]:
        """Events of topics, without a snapshot and without an end."""
        async with self._hub.subscribe(topics, after) as subscription:
            while True:
                event = await subscription.next(HEARTBEAT_SECONDS)
                yield _heartbeat() if event is None else to_message(event)

    async def of_model(self, model: Any, after: int) -> AsyncIterator[events_pb2.Event]:
        """A model's state now, then its events after a sequence."""
        yield _snapshot("model", model.id, model)
        async for event in self.of_topics([topic_of("model", model.id)], {model.id: after}):
            yield event

    async def of_job(self, job: Job, message: Message, after: int) -> AsyncIterator[events_pb2.Event]:
        """A job's state now, then its events after a sequence, up to the one that ends it."""
        yield _snapshot(job.event_prefix, job.resource_id, message)
        async with self._hub.subscribe([topic_of(job.event_prefix, job.resource_id)], {job.resource_id: after}) as tail:
            while True:
                event = await tail.next(HEARTBEAT_SECONDS)
                if event is not None:
                    yield to_message(event)
                    if event.data.get("job_id") == job.id and event.event.partition(":")[2] in Job.ENDED:
                        return
                elif (await self._jobs.get(job.id)).ended:  # its end was before `after`, or has been purged
                    return
                else:
                    yield _heartbeat()


class EventServicer(jobs_pb2_grpc.EventServiceServicer):
    """Events of all services."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[events_pb2.Event]:
        """Follow topics."""
        async for event in self._feeds.of_topics(list(request.topics), dict(request.after)):
            yield event


def _snapshot(prefix: str, resource_id: str, message: Message) -> events_pb2.Event:
    """The state when the watch began; no event of its own, so it has no sequence."""
    event = events_pb2.Event(event=f"{prefix}:snapshot", resource_id=resource_id)
    event.timestamp.GetCurrentTime()
    event.data.update(to_json(message))
    return event


def _heartbeat() -> events_pb2.Event:
    event = events_pb2.Event(event="mesh:heartbeat")
    event.timestamp.GetCurrentTime()
    return event
