"""The registry's own job kinds: loads, preloads and switches, as leases that the operations understand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from services.kit.jobs import Cancelled, Claim, Handler, JobStore
from services.registry.adapters.postgres import LOAD_KIND, PRELOAD_KIND, SWITCH_KIND, PostgresTransaction
from services.registry.failures import load_failure
from services.registry.operations.groups import run_preload
from services.registry.operations.parking import forget
from services.registry.operations.registry import Registry
from services.registry.operations.running import run_load, settle
from services.registry.operations.switching import run_switch

T = TypeVar("T")


class ClaimLease:
    """Implements LoadLease on a claimed job."""

    def __init__(self, claim: Claim, jobs: JobStore) -> None:
        self.id = claim.job.id
        self.payload: Mapping[str, Any] = claim.job.payload
        self.last_attempt = claim.job.attempt >= jobs.max_attempts
        self._claim = claim
        self._jobs = jobs

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the job is to stop."""
        return await self._claim.unless_stopped(work)

    async def checkpoint(self) -> None:
        """Raise when the job is to stop."""
        await self._claim.checkpoint()

    async def progress(self, percent: float, detail: Mapping[str, Any]) -> None:
        """Write how far it is; inside `commit` this joins the transaction."""
        await self._claim.progress(percent, dict(detail))

    async def insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Repeat `write` while the database does not answer."""
        await self._claim.insist(write)

    @asynccontextmanager
    async def commit(self) -> AsyncIterator[PostgresTransaction]:
        """A transaction that counts only while the lease is ours."""
        async with self._claim.commit() as conn:
            yield PostgresTransaction(conn, self._jobs)


def handlers(registry: Registry, jobs: JobStore) -> dict[str, Handler]:
    """What the registry's worker does, by kind."""

    async def load(claim: Claim) -> dict[str, Any]:
        lease = ClaimLease(claim, jobs)
        try:
            return await run_load(registry, lease)
        except Cancelled:
            async with lease.commit() as tx:
                await settle(registry, tx, lease.id, load_failure("CANCELLED", "The load was cancelled"))
            raise

    async def preload(claim: Claim) -> dict[str, Any]:
        lease = ClaimLease(claim, jobs)
        try:
            return await run_preload(registry, lease)
        except Cancelled:
            async with lease.commit() as tx:
                await forget(tx, lease.id)
            raise

    async def switch(claim: Claim) -> dict[str, Any]:
        return await run_switch(registry, ClaimLease(claim, jobs))

    return {LOAD_KIND: load, PRELOAD_KIND: preload, SWITCH_KIND: switch}
