"""What every operation is given: the ports and the limits."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from services.kit.errors import Unavailable
from services.registry.dataset_ports import DatasetFiles
from services.registry.job_ports import Gauges
from services.registry.operations.foresight import Foresight
from services.registry.operations.spread import Spread
from services.registry.operations.turns import Turns
from services.registry.ports import ModelHosts, Peers, Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings that decisions depend on."""

    loads_per_hour: int
    """Loads that one user may start within an hour."""
    max_resident_models: int
    """Models on one device."""
    host_timeout: float
    """Seconds of silence after which a host is lost."""
    heartbeat_seconds: float
    """Seconds between heartbeats."""
    duplicate_at: int
    """Forwards that make every copy of a model so hot that it gets another one; never when 0."""
    predictive_preload: bool
    """Whether what a user is likely to switch to next is brought while there is room for it."""
    minimum_residency: float
    """Seconds for which a model that has come to a device leaves it after all others, and for no preload."""


class Endings:
    """Wakes who waits in this process for jobs that end in this process; others look at the rows once a second."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)

    def ended(self, job_id: str) -> None:
        """The job's handler is done."""
        for event in self._waiting.pop(job_id, ()):
            event.set()

    async def wait(self, job_id: str, seconds: float = 1.0) -> None:
        """Until the job ended here, at most so long."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            if job_id in self._waiting:
                self._waiting[job_id].discard(event)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]


@dataclass(frozen=True, slots=True)
class Registry:
    """The control plane's ports and limits."""

    store: Store
    hosts: ModelHosts
    peers: Peers
    files: DatasetFiles
    gauges: Gauges
    limits: Limits
    endings: Endings = field(default_factory=Endings)
    spread: Spread = field(default_factory=Spread)
    relieved: dict[str, datetime] = field(default_factory=dict)
    """By host, the measurement after which a model left it because the device was nearly full."""
    turns: Turns = field(default_factory=Turns)
    foresight: Foresight = field(default_factory=Foresight)

    async def ask_a_host(self, question: Callable[[str], Awaitable[T]]) -> T:
        """What a host answers about model files; the next one is asked where one does not answer.

        Args:
            question: takes a host's address.

        Raises:
            Unavailable: `NO_HOST`, or what the last one said.
        """
        async with self.store.transaction() as tx:
            hosts = await tx.placement.hosts()
        failure = no_host()
        for host in sorted(hosts, key=lambda host: ("extraction" not in host.services, host.name)):
            try:
                return await question(host.address)
            except Unavailable as error:
                failure = error
        raise failure


def no_host(device: str = "") -> Unavailable:
    """Nobody offers a device."""
    text = f"No live host has device {device}" if device else "No host has announced itself yet"
    return Unavailable(text, reason="NO_HOST", metadata={"device": device}, retry_after=5.0)
