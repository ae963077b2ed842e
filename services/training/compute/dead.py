"""The auxiliary loss that brings dead latents back, encoder and decoder alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.residency.lenses.selection import Encoder, select_topk
from services.training.compute.nested import Parameters
from services.training.compute.products import Dense
from services.training.compute.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Revival:
    """Loss of the dead latents, and gradients of W_enc, b_enc and W_dec for the rows `latents` only."""

    loss: float
    latents: Tensor
    gradients: Parameters


def revive(
    parameters: Parameters,
    dead: Tensor,
    x: Tensor,
    residual: Tensor,
    *,
    aux_k: int,
    weight: float,
    ranks: Ranks = ALONE,
) -> Revival:
    """AuxK: the aux_k strongest dead latents of every row model what the living ones left.

    Gao et al. 2024 (arXiv:2406.04093), appendix A.2. The residual is a constant here, so that the living are not pulled
    towards what the dead can do.

    Args:
        parameters: all of them; only those of dead latents get a gradient.
        dead: int64 [n], the dead latents, n > 0.
        x: [N, d_in].
        residual: [N, d_out].
        aux_k: dead latents per row, at least 1.
        weight: of this loss, on the gradients only.
        ranks: whose residuals' variance is the loss's unit.
    """
    encoder = Encoder(parameters["W_enc"][dead], parameters["b_enc"][dead])
    W_dec = parameters["W_dec"][dead]
    codes = select_topk(encoder, x, min(aux_k, len(dead)))
    products = Dense(codes, (len(dead),))  # most of them are active: no more than aux_k take turns
    error = products.parts(W_dec) - residual[:, None]
    variance = float(ranks.variance(residual).clamp_min(1e-12))
    loss = float(error.square().mean()) / variance
    upstream = error.mul_(2 * weight / (error.numel() * variance))
    return Revival(loss, dead, products.of_latents(products.by_value(upstream, W_dec), upstream, x))
