"""Models of this process's residency pool, brought here by the registry when they are elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import psutil
import torch

from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.residency.failures import insufficient_memory
from services.residency.families import Facts, Family, family_of
from services.residency.host_copy import device_bound, host_copy
from services.residency.lease import Lease
from services.residency.lenses import Spec
from services.residency.pool import Pool

T = TypeVar("T")


class PooledModel:
    """Implements the port `LeasedModel` on a lease."""

    def __init__(self, lease: Lease, pool: Pool) -> None:
        self._lease = lease
        self._pool = pool

    @property
    def model(self) -> torch.nn.Module:
        """The transformers model."""
        return self._lease.model

    @property
    def family(self) -> Family:
        """Its module map; of an encoder-decoder, which takes no lenses, its encoder's."""
        return self._lease.record.base.family or family_of(self._lease.model)

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, None where it has none."""
        return self._lease.tokenizer

    @property
    def facts(self) -> Facts:
        """What its config says."""
        return self._lease.facts

    @property
    def free_bytes(self) -> int:
        """Bytes left of the process's budget."""
        return self._pool.free_bytes

    @property
    def description(self) -> dict[str, Any]:
        """For the manifest."""
        record = self._lease.record
        return {
            "id": record.model_id,
            "digest": record.base.digest,
            "quantization": record.quantization,
            "dtype": str(self._lease.model.dtype).removeprefix("torch."),
            "family": self.family.name,
            "attention": self._lease.model.config._attn_implementation,
        }

    @property
    def on_host(self) -> bool:
        """Whether the pool's device is the CPU."""
        return self._pool.device == "cpu"

    async def host_copy(self) -> HostModel:
        """Made while the extension is in force."""
        if bound := await self.run(device_bound, self.model):
            raise errors.Unsupported(
                f"weights in the format {bound} run on a GPU only", metadata={"device": self._pool.device}
            )
        weights, free = self._lease.record.total_bytes, psutil.virtual_memory().available
        if weights > free:
            raise insufficient_memory(weights, free)
        return HostModel(self, await self.run(host_copy, self.model))

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the device's thread."""
        return await self._lease.run(work, *arguments)


class HostModel:
    """Implements the port `LeasedModel` on a copy of a leased model in the host's memory."""

    def __init__(self, leased: PooledModel, model: torch.nn.Module) -> None:
        self.model = model
        self.family, self.tokenizer, self.facts = leased.family, leased.tokenizer, leased.facts
        self.description = leased.description
        self.on_host = True

    @property
    def free_bytes(self) -> int:
        """Bytes of the host's memory that nobody uses."""
        return psutil.virtual_memory().available

    async def host_copy(self) -> HostModel:
        """Itself."""
        return self

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On any thread; one batch at a time, as its one user does."""
        return await asyncio.to_thread(work, *arguments)


class PooledModels:
    """Implements the port `Models`."""

    def __init__(self, pool: Pool, ensure_resident: Callable[[str], Awaitable[None]], artifacts: ArtifactStore) -> None:
        """Use these.

        Args:
            pool: the models of this process.
            ensure_resident: asks the registry to bring a model here.
            artifacts: where extensions' files are.
        """
        self._pool = pool
        self._ensure_resident = ensure_resident
        self._artifacts = artifacts

    async def bring(self, model_id: str) -> None:
        """Through the registry, which counts the bytes."""
        await self._ensure_resident(model_id)

    @asynccontextmanager
    async def lease(self, model_id: str, extension_uri: str) -> AsyncIterator[PooledModel]:
        """The extension is attached under the name of its content, and is taken off by the last who needs it.

        It is in force inside `run` only.
        """
        lens_id = extension_uri.rpartition("/")[2] or None
        async with AsyncExitStack() as stack:
            try:
                if lens_id is not None:
                    folder = self._artifacts.path(extension_uri)
                    spec = Spec(lens_id=lens_id, kind="extension", folder=folder)
                    attach = partial(self._pool.attach, model_id, spec)
                    await stack.enter_async_context(self._pool.guests.staying(model_id, lens_id, attach))
                held = await stack.enter_async_context(self._pool.lease(model_id, lens_id))
            except errors.Conflict as error:
                if error.reason != "WRONG_STATE":
                    raise
                gone = "the model left this process again"
                raise errors.Unavailable(gone, retry_after=1.0, transient=True) from error
            yield PooledModel(held, self._pool)
