"""Sparse codes: which latents are active on which rows, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Codes:
    """Active latents of N rows over a dictionary of D, ordered by row, then by latent.

    row: int64 [nnz], ascending. latent: int64 [nnz], ascending within a row. value: float [nnz], > 0 (or NaN where
    the input was). An inactive latent has no entry, so `len` is the number of active ones.
    """

    rows: int
    dict_size: int
    row: Tensor
    latent: Tensor
    value: Tensor

    def __len__(self) -> int:
        return self.latent.numel()

    @classmethod
    def of_rows(cls, values: Tensor, latents: Tensor, dict_size: int) -> Codes:
        """From k candidates of every row: values [N, k], latents int64 [N, k]; those at or below zero are left out."""
        latents, order = latents.sort(dim=1)
        values = values.gather(1, order)
        row = torch.arange(len(values), device=values.device).repeat_interleave(values.shape[1])
        codes = cls(len(values), dict_size, row, latents.flatten(), values.flatten())
        return codes.where(~(codes.value <= 0))  # not `> 0`: a NaN has to stay visible

    def where(self, keep: Tensor) -> Codes:
        """The entries that `keep`, bool [nnz], names."""
        if bool(keep.all()):
            return self
        return Codes(self.rows, self.dict_size, self.row[keep], self.latent[keep], self.value[keep])

    def prefix(self, width: int) -> Codes:
        """The entries of the dictionary's first `width` latents."""
        return self.where(self.latent < width)

    def dense(self) -> Tensor:
        """[N, D], zero where inactive."""
        out = self.value.new_zeros(self.rows, self.dict_size)
        out[self.row, self.latent] = self.value
        return out

    def counts(self) -> Tensor:
        """int64 [D]: on how many rows each latent is active."""
        return torch.bincount(self.latent, minlength=self.dict_size)


def starts(bag: Tensor, bags: int) -> Tensor:
    """int64 [bags + 1]: where each bag's entries start when entries are ordered by bag; `bag` int64 [nnz]."""
    return functional.pad(torch.bincount(bag, minlength=bags).cumsum(0), (1, 0))


def weighted_rows(matrix: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[bags, d]: each bag's sum of weight * matrix[index]; an empty bag is zero. A sparse-dense product in CSR form.

    matrix [n, d], index int64 [nnz], weight [nnz], offsets int64 [bags + 1] as `starts` gives them.
    """
    return functional.embedding_bag(index, matrix, offsets[:-1], mode="sum", per_sample_weights=weight.to(matrix.dtype))
