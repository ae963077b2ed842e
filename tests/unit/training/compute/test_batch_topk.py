"""BatchTopK's two-stage selection is exact."""

from __future__ import annotations

import pytest
import torch

from services.residency.lenses.selection import Encoder
from services.training.compute.batch_topk import select_batch_topk


def test_batch_topk_is_exact_when_one_row_holds_all_winners() -> None:
    torch.manual_seed(0)
    encoder, x = Encoder(torch.randn(64, 8), torch.zeros(64)), torch.randn(4, 8)
    x[1] *= 1000
    pre = x @ encoder.weight.T
    codes = select_batch_topk(encoder, x, 4)
    expected = pre.flatten().topk(16).values.sort().values
    assert torch.allclose(codes.value.sort().values, expected)
    assert set(codes.row.tolist()) == {1}


@pytest.mark.parametrize("likely", [None, 0.0, 0.5, 1.2, 1e9])
def test_where_it_looks_first_changes_nothing(likely: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    encoder = Encoder(torch.randn(64, 8, generator=generator), torch.zeros(64))
    x = torch.randn(32, 8, generator=generator)
    x[:3] *= 30
    expected = (x @ encoder.weight.T).flatten().topk(32 * 4)
    codes = select_batch_topk(encoder, x, 4, likely=None if likely is None else torch.tensor(likely))
    assert sorted((codes.row * 64 + codes.latent).tolist()) == sorted(expected.indices.tolist())
    assert torch.allclose(codes.value.sort().values, expected.values.sort().values)


def test_less_than_asked_is_everything_that_is_positive() -> None:
    x = torch.full((16, 64), -1.0)
    x[0, :40] = 1.0  # more than the candidates of one row, fewer than k of every row
    assert len(select_batch_topk(Encoder(torch.eye(64), torch.zeros(64)), x, 4)) == 40
