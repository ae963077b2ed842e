"""Processes that train one extension together: each takes its share of every batch, the gradients are added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True)
class Team:
    """This process among its likes; with more than one, torch.distributed's default group is theirs."""

    rank: int = 0
    size: int = 1

    @property
    def share(self) -> slice:
        """Rows of a batch that are this process's."""
        return slice(self.rank, None, self.size)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message; nothing to do alone."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Team()
