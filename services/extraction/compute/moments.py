"""Sums over activations from which mean, second moment and norms follow, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS = 256 * 1024
"""Converted at once: their float64 copy stays in the processor's cache."""


@dataclass(slots=True)
class Moments:
    """Sums over the rows seen so far.

    Attributes:
        count: rows.
        total: sum per dimension, float64 [d].
        squares: sum of squares per dimension, float64 [d].
        norms: sum of the rows' Euclidean norms, float64 [1].
    """

    count: int
    total: Tensor
    squares: Tensor
    norms: Tensor

    @classmethod
    def empty(cls, width: int) -> Moments:
        """No rows of `width` dimensions."""
        zeros = torch.zeros(width, dtype=torch.float64)
        return cls(0, zeros, zeros.clone(), torch.zeros(1, dtype=torch.float64))

    def add(self, rows: Tensor, count: int | None = None) -> None:
        """Sum up `rows`, [N, d] on the CPU, of which `count` are any and the others are zeros; all, if None."""
        size = min(len(rows), max(1, _NUMBERS // rows.shape[-1]))
        total, squares = torch.zeros(2, size, rows.shape[-1], dtype=torch.float64)  # columns are summed up once
        norms, held = torch.zeros(size, dtype=torch.float64), torch.empty_like(total)
        for part in rows.split(size):
            wide = held[: len(part)].copy_(part)
            total[: len(part)] += wide
            squares[: len(part)].addcmul_(wide, wide)
            norms[: len(part)] += torch.linalg.vector_norm(wide, dim=1)
        self.total += total.sum(0)
        self.squares += squares.sum(0)
        self.norms += norms.sum()
        self.count += len(rows) if count is None else count

    def merge(self, other: Moments) -> None:
        """Count another's rows too; the order of merges decides the last bits."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.norms += other.norms

    @property
    def mean(self) -> Tensor:
        """Mean per dimension, float64 [d]."""
        return self.total / self.count

    @property
    def second_moment(self) -> Tensor:
        """Mean square per dimension, float64 [d]."""
        return self.squares / self.count

    @property
    def variance(self) -> float:
        """Total variance, the sum over dimensions."""
        return float((self.second_moment - self.mean.square()).clamp(min=0).sum())

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return float(self.norms) / self.count

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What `from_tensors` needs, named `<prefix>.count` and so on."""
        parts = {"total": self.total, "squares": self.squares, "norms": self.norms, "count": torch.tensor([self.count])}
        return {f"{prefix}.{name}": tensor for name, tensor in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> Moments:
        """The moments that `tensors(prefix)` gave."""
        count, total, squares, norms = (tensors[f"{prefix}.{name}"] for name in ("count", "total", "squares", "norms"))
        return cls(int(count), total.clone(), squares.clone(), norms.clone())
