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

    def gather(self, tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """The tensor [n] on the CPU as each process has it, by rank; every process calls this at the same time."""
        if self.size == 1:
            return [tensor]
        everyones = [torch.empty_like(tensor, device=device) for _ in range(self.size)]
        distributed.all_gather(everyones, tensor.to(device))
        return [each.cpu() for each in everyones]

    def told(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The numbers of rank 0, whatever this process was given."""
        if self.size == 1:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.broadcast(message, src=0)
        return message.tolist()


ALONE = Team()
