"""Orders are permutations, differ by seed, spread evenly, and never change from release to release."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from services.residency.shuffle import draw, permutation


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_it_is_a_permutation(count):
    assert sorted(permutation(count, 1)) == list(range(count))


def splitmix64(state: int) -> int:
    """The reference implementation's output function, in whole numbers."""
    wrap = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & wrap
    return state ^ (state >> 31)


def test_the_order_is_fixed_for_ever():
    start = int.from_bytes(blake3(b"(7, 'mix')").digest(8), "little")
    keys = [splitmix64((start + (place + 1) * 0x9E3779B97F4A7C15) % 2**64) for place in range(100)]
    assert permutation(100, 7, "mix").tolist() == sorted(range(100), key=keys.__getitem__)
    assert draw(1000, 7, "mix") == start % 1000
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first output for seed 0, as published


def test_seeds_differ_in_any_part():
    orders = {tuple(permutation(50, *seed)) for seed in [(0,), (1,), (0, 1), (1, 0), ("0",), (-1,)]}
    assert len(orders) == 6


def test_places_are_taken_evenly():
    places = np.stack([permutation(8, seed) for seed in range(4000)])
    counts = np.stack([(places == value).sum(0) for value in range(8)])
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)
