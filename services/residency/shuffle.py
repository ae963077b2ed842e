"""Random orders that are the same on every machine and in every version of every library."""

from __future__ import annotations

import numpy as np
from blake3 import blake3


def permutation(count: int, *seed: int | str) -> np.ndarray:
    """0..count-1 in the random order that `seed` names, int64 [count].

    Every index gets the splitmix64 value of its place after the seed (Steele, Lea, Flood: Fast Splittable Pseudorandom
    Number Generators, 2014), and the indices are sorted by it. NumPy's and torch's own permutations may change between
    their versions, and a resumed job must find the order it began with.
    """
    start = np.uint64(_number(seed))
    keys = start + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


def draw(limit: int, *seed: int | str) -> int:
    """One of 0..limit-1, the one that `seed` names."""
    return _number(seed) % limit


def _number(seed: tuple[int | str, ...]) -> int:
    return int.from_bytes(blake3(repr(seed).encode()).digest(8), "little")
