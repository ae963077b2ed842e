"""What the extraction job needs of the process it runs in: a model, and the claim that its writes count under."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from services.extraction.compute import Moments, Plan, Unit
from services.extraction.domain import Cache, Task
from services.residency.families import Facts, Family
from services.residency.shards import FileEntry, Manifest, ShardEntry

T = TypeVar("T")
Describe = Callable[[tuple[ShardEntry, ...], FileEntry, FileEntry], Manifest]
"""Makes the manifest of the shards, the table of sequences and the statistics."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a finished extraction publishes beside its units."""

    plan: Plan
    key: str
    """Its content key, hook points left out."""
    sequences: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    describe: Describe
    shape: tuple[int, ...]
    """[tokens, width] or [samples, sequence, width]."""
    tokens_per_second: float | None
    """None where every unit was done before."""


class LeasedModel(Protocol):
    """A model in this process, for the length of a job."""

    @property
    def model(self) -> nn.Module:
        """Touch it inside `run` only."""

    @property
    def family(self) -> Family:
        """Its module map."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, None where it has none."""

    @property
    def facts(self) -> Facts:
        """What its config says."""

    @property
    def free_bytes(self) -> int:
        """Bytes of the device that are left."""

    @property
    def description(self) -> dict[str, Any]:
        """What really runs: `id, digest, quantization, dtype, family`."""

    @property
    def on_host(self) -> bool:
        """Whether its weights are in the host's memory and run there."""

    async def host_copy(self) -> LeasedModel:
        """The same model with its extension as a copy on the host.

        Raises:
            errors.Unsupported: its weights run on a GPU only.
            errors.Exhausted: `INSUFFICIENT_MEMORY`: of the host.
        """

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the device's thread, with the job's extension in force."""


class Models(Protocol):
    """The models of this process."""

    async def bring(self, model_id: str) -> None:
        """Have a model loaded into this process.

        Raises:
            errors.LensmeshError: why it cannot be here, for example `INSUFFICIENT_MEMORY`.
        """

    def lease(self, model_id: str, extension_uri: str) -> AbstractAsyncContextManager[LeasedModel]:
        """Hold a model that is here, with an extension in force unless its uri is empty.

        Raises:
            errors.Unavailable: it left again.
        """


class NotNeeded(Exception):
    """The extraction that is helped has ended, is to stop, or is none that this process can help."""


class Filler(Protocol):
    """Who fills units of an extraction."""

    async def begin(self) -> Task:
        """What is to be done.

        Raises:
            errors.NotFound, NotNeeded: the extraction was deleted.
        """

    async def kept_plan(self) -> Mapping[str, np.ndarray] | None:
        """The arrays of the plan that the job's units are made by, maybe damaged; None where they are not here."""

    async def checkpoint(self) -> None:
        """Raises when the job is to stop, or the claim is lost."""

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is dropped when the job is to stop."""

    async def lease_unit(self) -> int | None:
        """Number of a unit that is now ours to make; None where every unit is done or somebody's."""

    async def save_unit(self, unit: Unit, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        """Write a unit's files, then its row.

        Raises:
            errors.Exhausted: `CACHE_FULL`.
            NotNeeded: somebody else made it, or the job has ended.
        """


class Help(Filler, Protocol):
    """Help with a job that another process claims."""

    def joins(self, plan: Plan) -> None:
        """That the plan is the job's.

        Raises:
            NotNeeded: it is not.
        """

    def leasing(self) -> AbstractAsyncContextManager[None]:
        """Units are leased within the block."""


class Run(Filler, Protocol):
    """A claimed job: what it is to do, and what it writes, which counts only while the claim is its own."""

    async def waiting(self, reason: str | None) -> None:
        """Say what the job waits for, or that it goes on."""

    async def ahead(self) -> str | None:
        """An earlier extraction that runs and will answer this one, too."""

    async def resume(self, plan: Plan, samples: int, size_bytes: int) -> set[int]:
        """Keep the plan, make room on the disk; the units of this very plan that are done and intact.

        Raises:
            errors.Exhausted: `CACHE_FULL`.
        """

    async def done(self) -> set[int]:
        """Units that are done, whoever made them."""

    async def progress(self, percent: float, figures: Mapping[str, Any], *, tell: bool) -> None:
        """The job's progress; with an event where `tell`."""

    async def moments(self, plan: Plan) -> dict[str, Moments]:
        """Sums over all units, merged in their order."""

    async def publish(self, product: Product) -> str:
        """Make the units and their tables a cache; its id.

        Raises:
            errors.Exhausted: `CACHE_FULL`.
        """

    async def reuse(self, cache: Cache) -> None:
        """Complete the extraction with a cache that another one made meanwhile."""
