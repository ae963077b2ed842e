"""A leased job in its handler's hands: what it writes counts only while the lease is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from services.kit import errors
from services.kit.jobs import transitions
from services.kit.jobs.job import Cancelled, Job, Paused, StaleLease
from services.kit.jobs.store import JobStore
from services.kit.jobs.transitions import QUERIES, job_of

T = TypeVar("T")
_RETRY_SECONDS = 0.5


class Claim:
    """One lease of one job.

    A handler calls `checkpoint` between batches, `progress` as it goes, and publishes in `commit`. After a lost lease
    all of them raise StaleLease, and the handler's task is cancelled.
    """

    def __init__(self, store: JobStore, job: Job) -> None:
        self.job = job
        self._store = store
        self._finish_data: dict[str, Any] = {}
        self._cancel = self._pause = self._drain = self._lost = self._ended = False
        self._stop = asyncio.Event()
        self._writing = asyncio.Lock()
        self._writer: tuple[asyncio.Task[Any] | None, asyncpg.Connection] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._renewed_at = 0.0
        self._task: asyncio.Task[Any] | None = None

    @property
    def fence(self) -> int:
        """Number of this lease: the claims before it had smaller ones; part of every path that the handler writes."""
        return self.job.fence

    @property
    def stopping(self) -> bool:
        """Whether the handler should come to its next checkpoint soon; safe to read from other threads."""
        return self._stop.is_set()

    async def checkpoint(self) -> None:
        """Call between batches.

        Raises:
            Cancelled: drop what is half done.
            Paused: save the state; the job will be claimed again.
            StaleLease: somebody else may have the job by now.
        """
        await asyncio.sleep(0)  # a handler that never waits must not keep others from running
        self._raise_if_asked()

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the job is to stop (for waits that may be long).

        Raises:
            Cancelled, Paused, StaleLease: as `checkpoint` does.
        """
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._raise_if_asked()
            return await task
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def progress(
        self, percent: float, detail: dict[str, Any], event: str | None = None, data: dict[str, Any] | None = None
    ) -> None:
        """Write how far the job is, and an event with it; tried again while the database does not answer.

        Args:
            percent: 0 to 100.
            detail: figures for who reads the job; replaces the former ones.
            event: full name of an event to write, for example `extraction:progress`.
            data: facts of that event, beside those that every event of the job carries.

        Raises:
            StaleLease: the lease is lost; nothing was written.
        """

        async def write() -> None:
            async with self.commit() as conn:
                await conn.execute(QUERIES["progress"], self.job.id, min(max(percent, 0.0), 100.0), detail)
                if event is not None:
                    row = await conn.fetchrow(QUERIES["lock"], self.job.id)
                    await transitions.tell(conn, job_of(row), event.partition(":")[2], data)

        await self.insist(write)

    async def waiting(self, reason: str | None) -> None:
        """Say what the handler waits for, or None when it goes on.

        Raises:
            StaleLease: the lease is lost; nothing was written.
        """

        async def write() -> None:
            async with self.commit() as conn:
                await conn.execute(QUERIES["waiting"], self.job.id, reason)

        await self.insist(write)

    async def finalizing(self) -> None:
        """Say that the result is being made: the job can be cancelled, but no longer paused.

        Raises:
            StaleLease: the lease is lost; nothing was written.
        """

        async def write() -> None:
            async with self.commit() as conn:
                await conn.execute(QUERIES["finalizing"], self.job.id)

        await self.insist(write)

    def finish_data(self, data: dict[str, Any]) -> None:
        """Add facts to the event `completed`."""
        self._finish_data |= data

    @asynccontextmanager
    async def commit(self) -> AsyncIterator[asyncpg.Connection]:
        """A transaction that counts only under our lease: publish shards, checkpoints and results in it.

        The job's row stays locked until it commits, so that no other worker can take the job over meanwhile, and the
        lease is extended at its end. Within the block the claim's other writes join the transaction.

        Raises:
            StaleLease: the lease is lost; the block is not entered.
            errors.Unavailable: the database went away; whether the transaction counts is not known.
        """
        if self._writer is not None and self._inside():
            yield self._writer[1]
            return
        async with self.locked() as (conn, _job):
            yield conn
            extended_at = asyncio.get_running_loop().time()
            await conn.execute(QUERIES["extend"], self.job.id, self._store.lease)
        self.renewed(extended_at)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[tuple[asyncpg.Connection, Job]]:
        """The worker's own writes: a transaction with the job's row locked and the lease checked."""
        async with self._writing:
            if self._lost:
                raise StaleLease
            try:
                async with self._store.database.transaction() as conn:
                    row = await conn.fetchrow(QUERIES["lock_leased"], self.job.id, self.fence, self.job.owner)
                    if row is None:
                        self.lose()
                        raise StaleLease
                    self._writer = (asyncio.current_task(), conn)
                    yield conn, job_of(row)
            finally:
                self._writer = None

    async def insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Repeat `write` while the database does not answer and the lease may still be ours."""
        while True:
            try:
                return await write()
            except errors.Unavailable:
                if self._inside():  # the caller's transaction is lost with this write
                    raise
                if self._lost:
                    raise StaleLease from None
                await asyncio.sleep(_RETRY_SECONDS)

    # What the worker tells the claim.

    def start(self, task: asyncio.Task[Any], claimed_at: float) -> None:
        """The handler runs as `task`; the lease was asked for at `claimed_at` of the loop's clock."""
        self._task = task
        self.renewed(claimed_at)

    def renewed(self, asked_at: float) -> None:
        """The lease holds for its whole length from `asked_at`, of the loop's clock, at least."""
        if self._lost or self._ended:
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._renewed_at = asked_at
        patience = self._store.lease.total_seconds() * 2 / 3
        self._expiry = asyncio.get_running_loop().call_at(asked_at + patience, self._expire)

    def asked(self, *, cancel: bool, pause: bool) -> None:
        """The row's columns say that the job is to stop, or no longer so."""
        self._cancel, self._pause = cancel, pause
        if cancel or pause or self._drain:
            self._stop.set()
        else:
            self._stop.clear()

    def drain(self) -> None:
        """The process ends."""
        self._drain = True
        self._stop.set()

    def doubt(self, asked_at: float) -> None:
        """A look at the row, begun at `asked_at` of the loop's clock, found the lease run out or somebody else's."""
        if self._writer is None and self._renewed_at <= asked_at:  # else our own transaction holds the row, or just did
            self.lose()

    def lose(self) -> None:
        """The lease is gone, or may be: stop the handler."""
        if self._lost or self._ended:
            return
        self._lost = True
        self._stop.set()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def end(self) -> None:
        """The job's state is written, or the handler is gone: there is nothing left to lose."""
        self._ended = True
        if self._expiry is not None:
            self._expiry.cancel()

    @property
    def lost(self) -> bool:
        """Whether the lease is gone, or may be."""
        return self._lost

    @property
    def pause_asked(self) -> bool:
        """Whether a person asked for the pause, rather than the process that drains."""
        return self._pause

    @property
    def completed_data(self) -> dict[str, Any]:
        """Facts that the handler added to the event `completed`."""
        return self._finish_data

    def _inside(self) -> bool:
        """Whether the calling task is within its own `commit`."""
        return self._writer is not None and self._writer[0] is asyncio.current_task()

    def _expire(self) -> None:
        if self._writer is not None:  # a row lock of our own transaction keeps everybody else away
            self._expiry = asyncio.get_running_loop().call_later(1.0, self._expire)
            return
        self.lose()

    def _raise_if_asked(self) -> None:
        if self._lost:
            raise StaleLease
        if self._cancel:
            raise Cancelled
        if self._pause or self._drain:
            raise Paused


Handler = Callable[[Claim], Awaitable[dict[str, Any]]]
"""Does one kind of job and returns its result. A transient LensmeshError or OSError is tried again, others fail it."""
