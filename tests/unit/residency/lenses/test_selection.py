"""Selection is exact: the same entries as a plain top-k over the whole matrix, block by block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.residency.lenses import selection
from services.residency.lenses.selection import Encoder, largest, select_above, select_topk


def dense_topk(pre: torch.Tensor, k: int) -> torch.Tensor:
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


@given(st.integers(1, 6), st.sampled_from([7, 64, 256, 1024, 4096]), st.integers(1, 40), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_the_chunked_search_finds_the_same_values_as_topk(rows: int, width: int, k: int, seed: int) -> None:
    k = min(k, width)
    pre = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    values, indices = largest(pre, k)
    assert torch.equal(values.sort(1).values, pre.topk(k, 1).values.sort(1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_ties_are_broken_within_k() -> None:
    values, indices = largest(torch.ones(3, 4096), 32)
    assert values.shape == (3, 32)
    assert all(len(set(row)) == 32 for row in indices.tolist())


def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder, x = Encoder(torch.randn(64, 8), torch.randn(64)), torch.randn(10, 8)
    whole = select_topk(encoder, x, 4).dense()
    monkeypatch.setattr(selection, "BLOCK_ELEMENTS", 64 * 3)
    assert torch.allclose(select_topk(encoder, x, 4).dense(), whole, atol=1e-6)
    assert torch.allclose(whole, dense_topk(x @ encoder.weight.T + encoder.bias, 4), atol=1e-5)


def test_a_row_of_negative_pre_activations_has_no_entry_and_a_nan_stays() -> None:
    encoder = Encoder(torch.eye(4), torch.zeros(4))
    x = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [1.0, 0.0, -1.0, 2.0], [float("nan"), 0.0, 0.0, 0.0]])
    codes = select_topk(encoder, x, 2)
    assert codes.row.tolist()[:2] == [1, 1]
    assert codes.latent.tolist()[:2] == [0, 3]
    assert codes.value[codes.row == 2].isnan().any()


def test_thresholds_are_strict() -> None:
    encoder = Encoder(torch.eye(3), torch.zeros(3))
    codes = select_above(encoder, torch.tensor([[0.5, 0.5, 0.6]]), torch.tensor([0.4, 0.5, 0.5]))
    assert codes.latent.tolist() == [0, 2]
