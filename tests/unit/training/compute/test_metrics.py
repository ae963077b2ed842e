"""Golden facts of the fraction of variance unexplained."""

from __future__ import annotations

import math

import pytest
import torch

from services.training.compute import FvuAccumulator, compute_fvu


@pytest.fixture
def y() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1000, 7) * torch.tensor([1, 2, 3, 4, 5, 6, 70.0]) + 1000 * torch.arange(7)


def test_the_mean_gives_exactly_one_and_the_truth_exactly_zero() -> None:
    y = torch.tensor([[0.0, 2.0], [2.0, 4.0], [1.0, 0.0]])  # its means, 1 and 2, are exact in binary
    assert compute_fvu(y, y.mean(0).expand_as(y)) == 1.0
    assert compute_fvu(y, y) == 0.0


def test_it_is_the_formula(y: torch.Tensor) -> None:
    guess = y + torch.randn_like(y)
    exact = y.double()
    expected = (exact - guess.double()).pow(2).sum() / (exact - exact.mean(0)).pow(2).sum()
    assert compute_fvu(y, guess) == pytest.approx(expected.item(), rel=1e-12)


def test_a_constant_error_counts_and_a_shift_of_everything_does_not(y: torch.Tensor) -> None:
    guess = y + torch.randn_like(y)
    assert compute_fvu(y, guess + 5) > 1.2 * compute_fvu(y, guess)
    exact, near = y.double(), guess.double()
    assert compute_fvu(exact + 64, near + 64) == pytest.approx(compute_fvu(exact, near), rel=1e-12)


def test_the_denominator_is_about_the_mean_of_each_dimension(y: torch.Tensor) -> None:
    grand_mean = torch.full_like(y, y.mean().item())
    assert compute_fvu(y, grand_mean) > 100  # 1.0 where the variance between dimensions is let in


def test_how_the_rows_are_cut_does_not_matter(y: torch.Tensor) -> None:
    guesses = torch.stack([y + torch.randn_like(y), y * 0.9])
    parts = FvuAccumulator(2)
    for part in torch.arange(1000).split([1, 700, 0, 250, 49]):
        parts.add(y[part], guesses[:, part])
    assert parts.fvu() == pytest.approx([compute_fvu(y, g) for g in guesses], rel=1e-12)
    assert torch.allclose(parts.mean, y.double().mean(0))


def test_float32_rows_far_from_zero_lose_nothing() -> None:
    torch.manual_seed(0)
    y = torch.randn(4096, 3)
    far, guess = FvuAccumulator(1), y + 0.25
    for part in torch.arange(4096).split(512):
        far.add(y[part].double() + 1e6, (guess[part].double() + 1e6)[None])
    assert far.fvu()[0] == pytest.approx(compute_fvu(y, guess), rel=1e-6)


def test_leading_dimensions_are_rows(y: torch.Tensor) -> None:
    assert compute_fvu(y.view(10, 100, 7), y.view(10, 100, 7) * 0.5) == compute_fvu(y, y * 0.5)


def test_impossible_input() -> None:
    with pytest.raises(ValueError, match="x_reconstruct"):
        compute_fvu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no rows"):
        compute_fvu(torch.zeros(0, 3), torch.zeros(0, 3))
    assert compute_fvu(torch.ones(4, 2), torch.ones(4, 2)) == 0.0
    assert compute_fvu(torch.ones(4, 2), torch.zeros(4, 2)) == math.inf
