"""Who waits is served together: what is asked for while a piece of work runs is the next piece of work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gathering(Generic[T, R]):
    """One piece of work at a time, for all who asked meanwhile, in the order in which they asked."""

    def __init__(self, work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], most: int = 100) -> None:
        """Nothing runs before somebody asks.

        Args:
            work: answers for what was asked, in its order; an exception is raised to who asked for it.
            most: how many are served together.
        """
        self._work = work
        self._most = most
        self._asked: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, wanted: T) -> R:
        """The answer for `wanted`; work that has begun goes on when the caller is cancelled.

        Raises:
            Exception: what the work gave for it, or raised.
        """
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._asked.append((wanted, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        try:
            while self._asked:
                together = [self._asked.popleft() for _ in range(min(self._most, len(self._asked)))]
                await self._serve([(wanted, answer) for wanted, answer in together if not answer.done()])
        finally:
            self._task = None
            for _, answer in self._asked:  # only when the process ends
                answer.cancel()

    async def _serve(self, together: list[tuple[T, asyncio.Future[R]]]) -> None:
        if not together:
            return
        try:
            found = await self._work([wanted for wanted, _ in together])
        except Exception as error:
            found = [error] * len(together)
        except asyncio.CancelledError:
            for _, answer in together:
                answer.cancel()
            raise
        for (_, answer), each in zip(together, found, strict=True):
            if answer.done():
                continue
            if isinstance(each, Exception):
                answer.set_exception(each)
            else:
                answer.set_result(each)
