"""The processes that train the same coders together, each on its share of every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from services.training.compute.config import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world` equal ones over torch.distributed's default group; alone nothing is communicated.

    Every rank reads the same batches and takes its share of the rows. What is reduced (losses, gradients, thresholds,
    counts of active latents, BatchTopK's selection) is what one process finds on the whole batch, and the same on all
    ranks to the bit; so every rank makes the same update, and any rank's state is the training's.

    Attributes:
        rank: from 0; `world`: how many.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def joined(cls) -> Ranks:
        """Those of torch.distributed's default group; one alone where none is initialised."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def check(self, batch_size: int) -> None:
        """A batch can be shared out evenly.

        Raises:
            ConfigError: it cannot.
        """
        if batch_size % self.world:
            raise ConfigError("batch_size", f"{batch_size} rows cannot be shared evenly by {self.world} devices")

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of a whole batch [N, …], N a multiple of the world's size."""
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over ranks in place of each tensor."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.world)

    def total(self, counts: Tensor) -> Tensor:
        """Sum over ranks; in place."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    def least(self, value: Tensor) -> Tensor:
        """Smallest over ranks; in place."""
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def gathered(self, tensor: Tensor) -> Tensor:
        """[world * n, …] of equal tensors [n, …], in the order of ranks."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def first_(self, tensors: Iterable[Tensor]) -> None:
        """Put rank 0's values in place of each tensor."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def variance(self, rows: Tensor) -> Tensor:
        """Mean square of all ranks' rows [N, d] about their common mean, per element; a float64 scalar."""
        mean = rows.mean(0)
        about = (rows - mean).square_().mean(dtype=torch.float64)
        if self.world == 1:
            return about
        means, abouts = self.gathered(mean.double()[None]), self.gathered(about[None])
        return abouts.mean() + (means - means.mean(0)).square_().mean()


ALONE = Ranks()
"""One process."""
