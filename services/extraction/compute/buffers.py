"""Memory of units that are written, for those that are filled next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_ROUNDED = 2**20
"""Bytes: units differ by a few rows."""


class Buffers:
    """Hands out memory that was given back before it asks for new: every new page costs the processor time."""

    def __init__(self) -> None:
        self._spare: list[torch.UntypedStorage] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with whatever numbers are there."""
        size = math.prod(shape) * dtype.itemsize
        place = next((place for place, spare in enumerate(self._spare) if spare.nbytes() >= size), None)
        if place is None:
            self._spare.clear()  # of smaller ones
            storage = torch.empty(size + -size % _ROUNDED, dtype=torch.uint8).untyped_storage()
        else:
            storage = self._spare.pop(place)
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Nobody reads these any more; they came from `take`."""
        self._spare += [tensor.untyped_storage() for tensor in tensors]
