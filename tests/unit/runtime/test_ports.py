"""Ports of meshes that start at the same time."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from services.runtime.ports import reserve_all

SAME_CHOICE = """
import random
from services.runtime.ports import reserve_all
random.seed(7)
print(reserve_all([("127.0.0.1", 0)])[0], flush=True)
input()
"""


def test_meshes_that_start_together_get_different_ports() -> None:
    """Also while nobody listens on them yet; a port is free again when its mesh has ended."""
    before = random.getstate()
    with subprocess.Popen(
        [sys.executable, "-c", SAME_CHOICE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        taken = int(other.stdout.readline())
        random.seed(7)
        own = reserve_all([("127.0.0.1", 0), ("127.0.0.1", 0)])
        assert len({taken, *own}) == 3
        other.communicate("\n", timeout=30)
    random.seed(7)
    assert reserve_all([("127.0.0.1", 0)]) == [taken]
    random.setstate(before)


@pytest.mark.parametrize("count", [2, 30])
def test_a_meshs_own_ports_differ(count: int) -> None:
    assert len(set(reserve_all([("127.0.0.1", 0)] * count))) == count
