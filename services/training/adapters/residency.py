"""Models of this process's residency pool, brought here by the registry when they are elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from torch import nn

from services.kit import errors
from services.residency.families import Facts, Family
from services.residency.lease import Lease
from services.residency.pool import Pool

T = TypeVar("T")


class PooledModel:
    """Implements the port `LeasedModel` on a lease."""

    def __init__(self, lease: Lease, device: str) -> None:
        self._lease = lease
        self.device = device
        self.tokenizer = lease.tokenizer

    @property
    def model(self) -> nn.Module:
        """The transformers model."""
        return self._lease.model

    @property
    def family(self) -> Family:
        """Its module map."""
        return self._lease.family

    @property
    def facts(self) -> Facts:
        """What its config says."""
        return self._lease.facts

    @property
    def digest(self) -> str:
        """Of its files."""
        return self._lease.record.base.digest

    @property
    def weight_bytes(self) -> int:
        """Measured when it was loaded."""
        return self._lease.record.nbytes

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the device's thread."""
        return await self._lease.run(work, *arguments)


class PooledModels:
    """Implements the port `Models`."""

    def __init__(self, pool: Pool, ensure_resident: Callable[[str], Awaitable[None]]) -> None:
        """Use these.

        Args:
            pool: the models of this process.
            ensure_resident: asks the registry to bring a model here.
        """
        self._pool = pool
        self._ensure_resident = ensure_resident

    async def bring(self, model_id: str) -> None:
        """Through the registry, which counts the bytes."""
        await self._ensure_resident(model_id)

    @asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[PooledModel]:
        """The bare base."""
        lease = self._pool.lease(model_id)
        try:
            held = await lease.__aenter__()
        except errors.Conflict as error:
            raise errors.Unavailable("the model left this process again", retry_after=1.0, transient=True) from error
        try:
            yield PooledModel(held, self._pool.device)
        finally:
            await lease.__aexit__(None, None, None)
