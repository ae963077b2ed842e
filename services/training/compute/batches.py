"""Where rows come from and in which order: seed and position decide alone, so that a step count is a data cursor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from services.training.compute.config import ConfigError

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By pair's name: inputs [N, d_in] and targets [N, d_out] of the same rows; row i of all pairs is the same token's."""


class Source(Protocol):
    """Paired activations of one or more places in a model."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """(d_in, d_out) of every pair."""
        ...

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Batches of `batch_size` rows as stored, without end: pass after pass, each in another order.

        The same seed gives the same rows after the same `start`, the number of rows that are passed over.
        """
        ...


class InMemory:
    """Tensors that are there already."""

    def __init__(self, pairs: Pairs) -> None:
        """Take x [N, d_in] and y [N, d_out] of every pair.

        Raises:
            ConfigError: shapes or dtypes do not fit.
        """
        for x, y in pairs.values():
            _check_pair(x, y)
        if len({len(x) for x, _ in pairs.values()}) != 1:
            raise ConfigError("x", "every pair needs the same number of rows")
        self._pairs = pairs

    @property
    def rows(self) -> int:
        """Rows of every tensor."""
        return len(next(iter(self._pairs.values()))[0])

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Widths by pair."""
        return {name: (x.shape[1], y.shape[1]) for name, (x, y) in self._pairs.items()}

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Rows in a random order of each pass."""
        for index in shuffled(self.rows, batch_size, seed, start):
            yield {name: (x[index], y[index]) for name, (x, y) in self._pairs.items()}


def shuffled(rows: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Row numbers of batch after batch, int64 [batch_size]: whole passes, every pass in another order."""
    number, position = divmod(start, rows)
    order = _order_of(rows, seed, number)
    while True:
        parts, missing = [], batch_size
        while missing:
            part = order[position : position + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
            if position == rows:
                number, position = number + 1, 0
                order = _order_of(rows, seed, number)
        yield torch.cat(parts)


def _order_of(rows: int, seed: int, number: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63))


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if tensor.ndim != 2 or not tensor.shape[1]:
            raise ConfigError(name, f"shape {list(tensor.shape)}, expected [rows, width]")
        if not tensor.is_floating_point():
            raise ConfigError(name, f"{tensor.dtype}, expected a floating-point tensor")
    if len(x) != len(y):
        raise ConfigError("y", f"{len(y)} rows for the {len(x)} of x")
    if x.dtype != y.dtype:
        raise ConfigError("y", f"{y.dtype}, but x is {x.dtype}")
