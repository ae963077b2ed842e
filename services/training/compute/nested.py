"""The Matryoshka loss and its exact gradients as sparse products.

The loss is the weighted mean over nested prefixes m_1 < … < m_G of the mean square error of each prefix's own
reconstruction (Bussmann et al. 2025, arXiv:2503.17547, eq. 4), for a transcoder:

    y_hat_g = b_dec + W_skip x + sum over latents i < m_g of z_i W_dec[i]          L = sum_g w_g mean (y_hat_g - y)^2

Autograd pays for G dense decodes and two dense D x d products. But an active latent belongs to exactly one group, so
with s_g the part that group g's latents add,

    y_hat_g = b + s_1 + … + s_g          one sparse product for all s_g, then a running sum
    dL/ds_g = e_g + … + e_G              e_g = 2 w_g (y_hat_g - y) / (N d): a running sum from the other end
    dL/dz_i = <dL/ds_group(i), W_dec[i]>                 at the active entries only
    dL/dW_dec[i] = sum over rows of z_i dL/ds_group(i)   and   dL/dW_enc[i] = sum over rows of dL/dz_i x: both sparse

Every product has N k terms of width d whatever D is. Nothing is approximated: an inactive latent's gradient is zero in
the dense computation too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes, starts, weighted_rows
from services.residency.lenses.transcoder import group_of

Parameters = dict[str, Tensor]
"""W_enc [D, d_in] (a latent's row lies together), b_enc [D], W_dec [D, d_out], b_dec [d_out], perhaps
W_skip [d_out, d_in] and threshold [D]; float32."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The nested prefixes: cumulative widths, and weights [groups] that sum to 1."""

    widths: Sequence[int]
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Nested:
    """What one batch gives.

    Attributes:
        errors: mean square error of each prefix, float [groups].
        residual: y minus the whole dictionary's reconstruction, [N, d_out].
        gradients: by parameter; threshold is not among them.
        by_value: dL/dz of every entry of the codes, [nnz], before the cut at inactive entries.
    """

    errors: Tensor
    residual: Tensor
    gradients: Parameters
    by_value: Tensor


def nested_gradients(parameters: Parameters, codes: Codes, x: Tensor, y: Tensor, prefixes: Prefixes) -> Nested:
    """Errors and gradients of the loss above.

    Args:
        parameters: the weights.
        codes: of x over the whole dictionary; an entry whose value is 0 adds nothing and gets no encoder gradient.
        x: [N, d_in].
        y: [N, d_out].
        prefixes: whose reconstructions count, and how much.
    """
    W_dec, groups = parameters["W_dec"], len(prefixes.widths)
    bag = group_of(codes.latent, prefixes.widths) + codes.row * groups
    offsets = starts(bag, codes.rows * groups)
    error = weighted_rows(W_dec, codes.latent, codes.value, offsets).view(codes.rows, groups, -1)
    error[:, 0] += parameters["b_dec"] - y
    if "W_skip" in parameters:
        error[:, 0].addmm_(x, parameters["W_skip"].T)
    for g in range(1, groups):
        error[:, g] += error[:, g - 1]
    errors = torch.stack([error[:, g].square().mean() for g in range(groups)])
    residual = -error[:, -1]

    upstream = error.mul_(prefixes.weights[:, None] * (2 / y.numel()))
    for g in range(groups - 2, -1, -1):
        upstream[:, g] += upstream[:, g + 1]
    by_part = upstream.view(codes.rows * groups, -1)
    by_value = sampled_products(by_part, W_dec, offsets, codes.latent)
    gradients = latent_gradients(codes, by_value * (codes.value != 0), bag, by_part, x)
    gradients["b_dec"] = upstream[:, 0].sum(0)
    if "W_skip" in parameters:
        gradients["W_skip"] = upstream[:, 0].T @ x
    return Nested(errors, residual, gradients, by_value)


def latent_gradients(codes: Codes, by_value: Tensor, bag: Tensor, by_part: Tensor, x: Tensor) -> Parameters:
    """Gradients of W_enc, b_enc and W_dec, whole and dense, from those of the codes and of the parts they fed.

    Args:
        codes: the active entries.
        by_value: dL/dz of every entry, [nnz].
        bag: the part every entry feeds, int64 [nnz].
        by_part: dL/ds, [parts, d_out].
        x: [N, d_in].
    """
    order = codes.latent.sort(stable=True).indices
    offsets = starts(codes.latent, codes.dict_size)
    return {
        "W_enc": weighted_rows(x, codes.row[order], by_value[order], offsets),
        "b_enc": by_value.new_zeros(codes.dict_size).index_add_(0, codes.latent, by_value),
        "W_dec": weighted_rows(by_part, bag[order], codes.value[order], offsets),
    }


def sampled_products(left: Tensor, right: Tensor, offsets: Tensor, column: Tensor) -> Tensor:
    """[nnz]: <left[row], right[column]> at the entries of a CSR pattern only; left [R, d], right [C, d]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        empty = torch.zeros(len(column), dtype=left.dtype, device=left.device)
        pattern = torch.sparse_csr_tensor(offsets, column, empty, (len(left), len(right)), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
