"""A dictionary that is known is found again: coarse features in the first prefix, fine ones behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from services.training.compute import TrainConfig, compute_fvu, fit

COARSE, FINE, D_IN, D_OUT = 8, 56, 48, 40


def world() -> tuple[Tensor, Tensor]:
    """Directions in which features are read [64, D_IN] and written [64, D_OUT], unit rows."""
    generator = torch.Generator().manual_seed(7)
    read, write = (
        torch.randn(COARSE + FINE, D_IN, generator=generator),
        torch.randn(COARSE + FINE, D_OUT, generator=generator),
    )
    return read / read.norm(dim=1, keepdim=True), write / write.norm(dim=1, keepdim=True)


def drawn(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows in which a coarse feature is active three times as often, and three times as strong, as a fine one."""
    generator = torch.Generator().manual_seed(seed)
    often = torch.cat([torch.full((COARSE,), 0.12), torch.full((FINE,), 0.04)])
    strong = torch.cat([torch.full((COARSE,), 3.0), torch.ones(FINE)])
    active = torch.rand(rows, COARSE + FINE, generator=generator) < often
    features = active * strong * (1 + 0.3 * torch.randn(rows, COARSE + FINE, generator=generator)).clamp_min(0.2)
    read, write = world()
    return features @ read + 0.5, features @ write - 2


def test_a_planted_dictionary_is_recovered_coarse_features_first() -> None:
    config = TrainConfig(
        dict_size=2 * (COARSE + FINE),
        group_sizes=(2 * COARSE, 2 * FINE),
        top_k=4,
        batch_size=256,
        num_tokens=256 * 600,
        learning_rate=5e-3,
    )
    transcoder, _ = fit(*drawn(16_384, 0), config)
    rows = transcoder.W_dec / transcoder.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    likeness = world()[1] @ rows.T
    best, where = likeness.max(1)
    assert best.mean() >= 0.9
    assert best[:COARSE].min() >= 0.9
    assert (where[:COARSE] < 2 * COARSE).all()
    x, y = drawn(4096, 1)
    assert compute_fvu(y, transcoder(x)) < 0.15
