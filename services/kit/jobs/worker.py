"""The worker of a process: claims jobs, runs their handlers, keeps the leases, and gives them back when it ends."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import asyncpg
import structlog

from services.kit import errors
from services.kit.jobs import transitions
from services.kit.jobs.claim import Claim, Handler
from services.kit.jobs.job import Cancelled, Job, Paused, StaleLease
from services.kit.jobs.store import JobStore
from services.kit.jobs.transitions import CHANNEL, QUERIES
from services.kit.waiting import wait_for

_log = structlog.get_logger(__name__)

Change = Callable[[asyncpg.Connection, Job], Awaitable[Any]]
"""Moves a locked job to another state."""

POLL_SECONDS = 5.0
_RECONNECT_SECONDS = 1.0


@dataclass
class WorkerCounts:
    """What happened since the process started, for metrics."""

    stale_fences: int = 0
    """Jobs given up because the lease was lost."""
    renewal_failures: int = 0
    """Renewals that the database did not answer."""


class Worker:
    """Runs up to `slots` jobs at once until cancelled; then asks their handlers to stop and gives the leases back."""

    def __init__(
        self,
        store: JobStore,
        handlers: dict[str, Handler],
        *,
        device: str,
        incarnation: str,
        limits: Mapping[str, int],
        slots: int,
        drain_seconds: float = 10.0,
    ) -> None:
        """Describe the worker; `run` starts it.

        Args:
            store: the jobs.
            handlers: by kind.
            device: jobs for another device are left alone.
            incarnation: unique per process start; owns the leases.
            limits: per kind, how many jobs may run in the whole system.
            slots: how many jobs run here at once.
            drain_seconds: how long handlers may take to stop.
        """
        self.counts = WorkerCounts()
        self._store = store
        self._handlers = handlers
        self._device = device
        self._incarnation = incarnation
        self._limits = {kind: limit for kind, limit in limits.items() if kind in handlers}
        self._slots = slots
        self._drain_seconds = drain_seconds
        self._running: dict[str, Claim] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._attend = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._keep_leases())
            try:
                while True:
                    self._wake.clear()
                    await wait_for(self._wake, await self._fill_slots())
            finally:
                await self._drain()
                keeper.cancel()

    # Claiming

    async def _fill_slots(self) -> float:
        """Claim what there is room for; returns the seconds after which to look again without being told."""
        try:
            await self._store.reap()
            while len(self._running) < self._slots:
                asked_at = asyncio.get_running_loop().time()
                job, due = await self._store.claim(self._handlers, self._device, self._incarnation, self._limits)
                if job is None:
                    return POLL_SECONDS if due is None else min(max(due, 0.01), POLL_SECONDS)
                self._start(job, asked_at)
        except errors.Unavailable:
            return _RECONNECT_SECONDS
        return POLL_SECONDS

    def _start(self, job: Job, asked_at: float) -> None:
        claim = Claim(self._store, job)
        task = asyncio.create_task(self._work(claim), name=job.id)
        self._running[job.id] = claim
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._finished(task, claim))
        claim.start(task, asked_at)

    def _finished(self, task: asyncio.Task[None], claim: Claim) -> None:
        claim.end()
        self._tasks.discard(task)
        if self._running.get(claim.job.id) is claim:
            del self._running[claim.job.id]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("job not settled", job_id=claim.job.id, exc_info=error)

    # Running

    async def _work(self, claim: Claim) -> None:
        log = _log.bind(job_id=claim.job.id, kind=claim.job.kind, fence=claim.fence)
        try:
            await self._handle(claim)
        except StaleLease:
            self.counts.stale_fences += 1
            log.warning("lease lost")
        except asyncio.CancelledError:
            if not claim.lost:
                raise
            self.counts.stale_fences += 1
            log.warning("lease lost")

    async def _call(self, claim: Claim) -> dict[str, Any]:
        try:
            return await self._handlers[claim.job.kind](claim)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # by us
            raise errors.Failed("something that the handler waited for was cancelled", transient=True) from error

    async def _handle(self, claim: Claim) -> None:
        try:
            result = await self._call(claim)
        except (StaleLease, asyncio.CancelledError):
            raise
        except Cancelled:
            await self._settle(claim, transitions.cancel)
        except Paused:
            await self._settle(claim, transitions.pause if claim.pause_asked else _give_back)
        except Exception as error:
            await self._fail(claim, error)
        else:
            data = claim.completed_data

            async def complete(conn: asyncpg.Connection, job: Job) -> None:
                await transitions.complete(conn, job, result, data)

            await self._settle(claim, complete)

    async def _fail(self, claim: Claim, error: Exception) -> None:
        code, message, transient = _describe(error)
        details = error.metadata if isinstance(error, errors.LensmeshError) else {}

        async def fail(conn: asyncpg.Connection, job: Job) -> None:
            if transient:
                await self._store.retry_or_fail(conn, job, code, message)
            else:
                await transitions.fail(conn, job, code, message, details)

        _log.warning("job failed", job_id=claim.job.id, code=code, message=message, exc_info=error)
        await self._settle(claim, fail)

    async def _settle(self, claim: Claim, change: Change) -> None:
        """Write how the job ended; a cancel that was acknowledged wins over whatever the handler did meanwhile."""
        await claim.insist(lambda: self._settle_once(claim, change))

    async def _settle_once(self, claim: Claim, change: Change) -> None:
        async with claim.locked() as (conn, job):
            await (transitions.cancel if job.cancel_requested else change)(conn, job)
        claim.end()

    # Leases

    async def _keep_leases(self) -> None:
        """Renew and listen on a connection of our own, so that a full pool or a long query cannot cost a lease."""
        while True:
            try:
                async with self._store.database.dedicated() as conn:
                    await conn.add_listener(CHANNEL, self._notified)
                    conn.add_termination_listener(lambda _conn: self._attend.set())
                    self._wake.set()  # something may have been queued while nobody listened
                    while True:
                        self._attend.clear()
                        await self._renew(conn)
                        await wait_for(self._attend, self._store.lease.total_seconds() / 3)
            except errors.Unavailable:
                self.counts.renewal_failures += 1
                await asyncio.sleep(min(_RECONNECT_SECONDS, self._store.lease.total_seconds() / 10))

    async def _renew(self, conn: asyncpg.Connection) -> None:
        limit = self._store.lease.total_seconds() / 6
        claims = dict(self._running)
        asked_at = asyncio.get_running_loop().time()
        kinds = sorted(self._handlers)
        await conn.execute(
            QUERIES["announce"], self._incarnation, self._device, kinds, self._limits, self._slots, timeout=limit
        )
        renewed = await conn.fetch(QUERIES["renew"], list(claims), self._incarnation, self._store.lease, timeout=limit)
        for row in renewed:
            claims[row["id"]].renewed(asked_at)
        for row in await conn.fetch(QUERIES["leases"], list(claims), self._incarnation, timeout=limit):
            claim = claims[row["id"]]
            claim.asked(cancel=row["cancel_requested"], pause=row["pause_requested"])
            if not row["live"] or row["fence"] != claim.fence:
                claim.doubt(asked_at)

    def _notified(self, _conn: object, _pid: int, _channel: str, payload: str) -> None:
        what, _, job_id = payload.partition(":")
        if what == "stop" and job_id:
            if job_id in self._running:
                self._attend.set()
        elif payload in self._handlers:
            self._wake.set()

    # Ending

    async def _drain(self) -> None:
        for claim in self._running.values():
            claim.drain()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._drain_seconds)
        left = dict(self._running)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        try:
            for claim in left.values():
                with suppress(StaleLease):
                    await self._settle_once(claim, _give_back)
            async with self._store.database.connection() as conn:
                await conn.execute(QUERIES["withdraw"], self._incarnation)
        except errors.Unavailable:
            _log.warning("leases not given back, they run out by themselves", jobs=len(left))


async def _give_back(conn: asyncpg.Connection, job: Job) -> None:
    # The process ended, not the job: that start does not count.
    await transitions.again(conn, job, "queued", attempt=job.attempt - 1)


def _describe(error: Exception) -> tuple[str, str, bool]:
    """(reason, sentence, whether to try again); neither holds a path or a traceback."""
    if isinstance(error, errors.LensmeshError):
        return error.reason, error.message, error.transient
    if isinstance(error, OSError):
        text = os.strerror(error.errno) if error.errno else type(error).__name__
        return "UNAVAILABLE", f"the system said: {text}", True
    return "INTERNAL", f"unexpected error {secrets.token_hex(8)}", False
