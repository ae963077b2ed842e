"""The products of a step over its codes, as gathers of the active entries or as dense matrices; both exact.

Gathering costs N k terms of width d whatever D is; a dense product N D of them, but each at a fraction of the price. On
the machines measured dense wins only where about every tenth latent or more is active.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes, starts, weighted_rows
from services.residency.lenses.transcoder import group_of

MEASURED_FROM = 16
"""Dense products are tried where at least one in so many latents is active."""
CLEARLY = 1.25
"""How many times faster they have to be; a machine's mood is not to decide."""
TRIES = 5


class Products(Protocol):
    """Of one batch's codes, whose latents belong to consecutive groups."""

    def parts(self, W_dec: Tensor) -> Tensor:
        """[N, groups, d_out]: what each group adds to the reconstruction."""
        ...

    def by_value(self, by_part: Tensor, W_dec: Tensor) -> Tensor:
        """[nnz]: dL/dz of every entry, from dL/d parts [N, groups, d_out]."""
        ...

    def of_latents(self, by_value: Tensor, by_part: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Gradients of W_enc, b_enc and W_dec, whole, from those of the codes [nnz] and of the parts."""
        ...


class Sparse:
    """Gathers. On CUDA the sampled products are cuSPARSE's, the sums torch's embedding kernels."""

    def __init__(self, codes: Codes, widths: Sequence[int]) -> None:
        self._codes, self._groups = codes, len(widths)
        self._bag = group_of(codes.latent, widths) + codes.row * self._groups
        self._offsets = starts(self._bag, codes.rows * self._groups)

    def parts(self, W_dec: Tensor) -> Tensor:
        """See `Products`."""
        summed = weighted_rows(W_dec, self._codes.latent, self._codes.value, self._offsets)
        return summed.view(self._codes.rows, self._groups, -1)

    def by_value(self, by_part: Tensor, W_dec: Tensor) -> Tensor:
        """See `Products`."""
        left, column = by_part.flatten(0, 1), self._codes.latent
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            empty, size = left.new_zeros(len(column)), (len(left), len(W_dec))
            pattern = torch.sparse_csr_tensor(self._offsets, column, empty, size, check_invariants=False)
            return torch.sparse.sampled_addmm(pattern, left, W_dec.T, beta=0.0).values()

    def of_latents(self, by_value: Tensor, by_part: Tensor, x: Tensor) -> dict[str, Tensor]:
        """See `Products`."""
        codes = self._codes
        order = codes.latent.sort(stable=True).indices
        offsets = starts(codes.latent, codes.dict_size)
        return {
            "W_enc": weighted_rows(x, codes.row[order], by_value[order], offsets),
            "b_enc": by_value.new_zeros(codes.dict_size).index_add_(0, codes.latent, by_value),
            "W_dec": weighted_rows(by_part.flatten(0, 1), self._bag[order], codes.value[order], offsets),
        }


class Dense:
    """Matrix products over all N x D codes."""

    def __init__(self, codes: Codes, widths: Sequence[int]) -> None:
        self._codes, self._z, self._groups = codes, codes.dense(), list(pairwise((0, *widths)))

    def parts(self, W_dec: Tensor) -> Tensor:
        """See `Products`."""
        return torch.stack([self._z[:, a:b] @ W_dec[a:b] for a, b in self._groups], 1)

    def by_value(self, by_part: Tensor, W_dec: Tensor) -> Tensor:
        """See `Products`."""
        whole = torch.cat([by_part[:, g] @ W_dec[a:b].T for g, (a, b) in enumerate(self._groups)], 1)
        return whole[self._codes.row, self._codes.latent]

    def of_latents(self, by_value: Tensor, by_part: Tensor, x: Tensor) -> dict[str, Tensor]:
        """See `Products`."""
        upstream = torch.zeros_like(self._z)
        upstream[self._codes.row, self._codes.latent] = by_value
        return {
            "W_enc": upstream.T @ x,
            "b_enc": upstream.sum(0),
            "W_dec": torch.cat([self._z[:, a:b].T @ by_part[:, g] for g, (a, b) in enumerate(self._groups)]),
        }


PRODUCTS: dict[str, type[Sparse] | type[Dense]] = {"sparse": Sparse, "dense": Dense}


def faster(*, d_in: int, d_out: int, widths: Sequence[int], top_k: int, rows: int, device: torch.device) -> str:
    """`sparse` or `dense`, whichever this machine does faster for codes of this form; measured once a process."""
    if top_k * MEASURED_FROM < widths[-1]:
        return "sparse"
    return _measured(
        d_in=d_in,
        d_out=d_out,
        widths=tuple(widths),
        top_k=top_k,
        rows=rows,
        device=device,
        threads=torch.get_num_threads(),
    )


@lru_cache
def _measured(
    *, d_in: int, d_out: int, widths: tuple[int, ...], top_k: int, rows: int, device: torch.device, threads: int
) -> str:
    del threads  # part of the key
    generator, dict_size = torch.Generator().manual_seed(0), widths[-1]
    x, by_part, W_dec = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((rows, d_in), (rows, len(widths), d_out), (dict_size, d_out))
    )
    latents = torch.rand(rows, dict_size, generator=generator).topk(top_k, 1).indices.to(device)
    codes = Codes.of_rows(torch.ones(latents.shape, device=device), latents, dict_size)
    seconds = dict.fromkeys(PRODUCTS, float("inf"))
    for name, kind in list(PRODUCTS.items()) * TRIES:
        begin = time.perf_counter()
        products = kind(codes, widths)
        products.parts(W_dec)
        gradients = products.of_latents(products.by_value(by_part, W_dec), by_part, x)
        float(gradients["b_enc"][0])  # waits for the device
        seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return "dense" if seconds["dense"] * CLEARLY < seconds["sparse"] else "sparse"
