"""Bases of this process's residency pool, brought here by the registry when they are elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from services.kit import errors
from services.residency.lease import Lease
from services.residency.lenses.extension import Extensions
from services.residency.pool import Pool

T = TypeVar("T")


class PooledBase:
    """Implements the port `Base` on a lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.model: Any = lease.model
        self.tokenizer: Any = lease.tokenizer
        self.attached: Extensions = lease.record.base.extensions
        self.digest = lease.record.base.digest
        self.directory = lease.record.directory
        self.quantization = lease.record.quantization
        self.nbytes = lease.record.nbytes

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the device's thread, the base bare unless `work` activates something."""
        return await self._lease.run(work, *arguments)


class PooledBases:
    """Implements the port `Bases`."""

    def __init__(self, pool: Pool, ensure_resident: Callable[[str], Awaitable[None]]) -> None:
        """Use these.

        Args:
            pool: the models of this process.
            ensure_resident: asks the registry to bring a model here.
        """
        self._pool = pool
        self._ensure_resident = ensure_resident

    @asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[PooledBase]:
        """Bring it here, then hold it.

        Raises:
            errors.Unavailable: it was evicted again before the lease began.
        """
        await self._ensure_resident(model_id)
        if all(resident.model_id != model_id for resident in self._pool.residents):
            raise errors.Unavailable("the model left this process again; try again", retry_after=1.0, transient=True)
        async with self._pool.lease(model_id) as lease:
            yield PooledBase(lease)
