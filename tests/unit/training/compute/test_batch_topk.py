"""BatchTopK's two-stage selection is exact."""

from __future__ import annotations

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
