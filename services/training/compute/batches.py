"""Which rows every step trains on: decided by seed and step alone, so that the step number is the whole data cursor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from services.training.compute.config import ConfigError

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By coder: inputs [N, d_in] and targets [N, d_out] of the same rows."""


class Source(Protocol):
    """Paired activations of one or more coders, row i of all of them from the same token."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def coders(self) -> Mapping[str, tuple[int, int]]:
        """Names of the coders, with the widths (d_in, d_out) of their rows."""
        ...

    def gather(self, index: Tensor) -> Pairs:
        """The rows `index`, int64 [n], in that order, as stored."""
        ...


class InMemory:
    """Tensors that are there already."""

    def __init__(self, pairs: Pairs) -> None:
        """Take x [N, d_in] and y [N, d_out] of every coder.

        Raises:
            ConfigError: shapes or dtypes do not fit.
        """
        for x, y in pairs.values():
            _check_pair(x, y)
        if len({len(x) for x, _ in pairs.values()}) != 1:
            raise ConfigError("x", "every coder needs the same number of rows")
        self._pairs = pairs

    @property
    def rows(self) -> int:
        """Rows of every tensor."""
        return len(next(iter(self._pairs.values()))[0])

    @property
    def coders(self) -> Mapping[str, tuple[int, int]]:
        """Widths by coder."""
        return {name: (x.shape[1], y.shape[1]) for name, (x, y) in self._pairs.items()}

    def gather(self, index: Tensor) -> Pairs:
        """The rows `index` of every tensor."""
        return {name: (x[index], y[index]) for name, (x, y) in self._pairs.items()}


class Order:
    """The rows of each step: whole passes over the data, every pass in another order.

    Runs of `run` neighbouring rows stay together, which keeps reads of a cache on disk sequential; its rows were
    shuffled when it was written.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, run: int = 1) -> None:
        """Check that there is a batch.

        Raises:
            ConfigError: fewer rows than a batch.
        """
        if rows < batch_size:
            raise ConfigError("batch_size", f"{batch_size} is more than the {rows} rows there are")
        self._rows, self._batch, self._seed, self._run = rows, batch_size, seed, run
        self._pass: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Tensor:
        """Row numbers of step `step`, int64 [batch_size]."""
        parts, position, missing = [], step * self._batch, self._batch
        while missing:
            number, start = divmod(position, self._rows)
            part = self._order_of(number)[start : start + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)

    def _order_of(self, number: int) -> Tensor:
        if self._pass is None or self._pass[0] != number:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
            runs = torch.randperm(-(-self._rows // self._run), generator=generator)
            order = (runs[:, None] * self._run + torch.arange(self._run)).flatten()
            self._pass = (number, order[order < self._rows])
        return self._pass[1]


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
