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

Nothing is approximated: an inactive latent's gradient is zero in the dense computation too. `products` has these
products over the active entries, and as dense ones for dictionaries so small that those are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.training.compute.products import Products, Sparse

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


def nested_gradients(
    parameters: Parameters,
    codes: Codes,
    x: Tensor,
    y: Tensor,
    prefixes: Prefixes,
    *,
    kind: Callable[[Codes, Sequence[int]], Products] = Sparse,
) -> Nested:
    """Errors and gradients of the loss above.

    Args:
        parameters: the weights.
        codes: of x over the whole dictionary; an entry whose value is 0 adds nothing and gets no encoder gradient.
        x: [N, d_in].
        y: [N, d_out].
        prefixes: whose reconstructions count, and how much.
        kind: how the products are made.
    """
    W_dec, groups, products = parameters["W_dec"], len(prefixes.widths), kind(codes, prefixes.widths)
    error = products.parts(W_dec)
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
    by_value = products.by_value(upstream, W_dec)
    gradients = products.of_latents(by_value * (codes.value != 0), upstream, x)
    gradients["b_dec"] = upstream[:, 0].sum(0)
    if "W_skip" in parameters:
        gradients["W_skip"] = upstream[:, 0].T @ x
    return Nested(errors, residual, gradients, by_value)
