"""Waiting: for an event with a limit, and ever longer between attempts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Whether `event` was set within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def cancel_all(tasks: Iterable[asyncio.Task[Any]], again_seconds: float = 1.0) -> None:
    """Until all have ended, cancel them, and again those that swallowed it (Python 3.11's `wait_for` may)."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again_seconds)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which nobody cancels: a caller who is cancelled waits for its end, and leaves then."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at, so that nobody misses it
        raise


class Backoff:
    """Delays that double from `first` to `last` seconds, each shortened at random by up to half against crowds."""

    def __init__(self, first: float, last: float) -> None:
        self._first, self._last = first, last
        self._next = first

    def next(self) -> float:
        """The next delay in seconds."""
        delay, self._next = self._next, min(self._next * 2, self._last)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing

    def reset(self) -> None:
        """Start over: an attempt succeeded."""
        self._next = self._first
