"""Where a coder starts: at the mean of the target, centred on the mean of the input, decoding what it encodes."""

from __future__ import annotations

import pytest
import torch

from services.training.compute import TrainConfig
from services.training.compute.initial import Scale, initial_parameters


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A linear map from 12 to 8 dimensions, both far from zero and in different units."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4096, 12, generator=generator) + 5
    return x, 0.01 * (x @ torch.randn(12, 8, generator=generator)) - 2


def test_scales_bring_both_sides_to_unit_variance() -> None:
    x, y = data()
    scale = Scale.of(x, y)
    for rows, factor in ((x, scale.source), (y, scale.target)):
        assert float((rows * factor).var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)
    assert Scale.of(torch.ones(4, 2), torch.ones(4, 2)) == Scale(1.0, 1.0)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_it_starts_at_the_means_with_a_decoder_made_of_the_encoder(unit_norm: bool) -> None:
    x, y = data()
    scale = Scale.of(x, y)
    config = TrainConfig(dict_size=64, top_k=4, num_tokens=4096, unit_norm_decoder=unit_norm).resolved(8)
    found = initial_parameters(config, scale, x, y)
    x, y = x * scale.source, y * scale.target
    assert torch.allclose(found["b_dec"], y.mean(0), atol=1e-5)
    assert torch.allclose(found["W_enc"] @ x.mean(0) + found["b_enc"], torch.zeros(64), atol=1e-4)
    sent = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution  # where the data sends a direction of x
    expected, rows = found["W_enc"] @ sent, found["W_dec"]
    assert torch.nn.functional.cosine_similarity(rows, expected).min() > 0.99
    lengths = rows.norm(dim=1)
    assert torch.allclose(lengths, lengths[:1].expand(64), rtol=1e-4)
    assert (float(lengths[0]) == pytest.approx(1, rel=1e-4)) == unit_norm


def test_a_skip_path_starts_as_the_regression() -> None:
    x, y = data()
    scale = Scale.of(x, y)
    found = initial_parameters(TrainConfig(dict_size=64, top_k=4, num_tokens=4096, skip=True).resolved(8), scale, x, y)
    guess = x * scale.source @ found["W_skip"].T + found["b_dec"]
    assert float((guess - y * scale.target).square().mean()) < 1e-3
