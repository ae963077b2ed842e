"""What the registry's jobs need beside the other ports: their lease, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from services.registry.ports import Transaction

T = TypeVar("T")


class LoadLease(Protocol):
    """A load's job while this process runs it."""

    @property
    def id(self) -> str:
        """The job's id."""

    @property
    def payload(self) -> Mapping[str, Any]:
        """What to do."""

    @property
    def last_attempt(self) -> bool:
        """Whether a transient failure now is final."""

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`; raises, and cancels it, when the job is to stop."""

    async def checkpoint(self) -> None:
        """Raises when the job is to stop."""

    async def progress(self, percent: float, detail: Mapping[str, Any]) -> None:
        """Write how far it is."""

    async def insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Repeat `write` while the database does not answer and the lease may still be ours."""

    def commit(self) -> AbstractAsyncContextManager[Transaction]:
        """A transaction that counts only while the lease is ours."""


class Gauges(Protocol):
    """What is measured on the way."""

    def load_ended(self, outcome: str, quantization: str, seconds: float, estimate_error: float | None) -> None:
        """A load ended: outcome is ready, cancelled or the reason of its failure."""

    def evicted(self, cause: str) -> None:
        """A model was evicted."""

    def foreseen(self, *, hit: bool) -> None:
        """A user switched; whether to what was foreseen."""

    def switched(self, kind: str, seconds: float) -> None:
        """A switch was done, measured in the registry."""
