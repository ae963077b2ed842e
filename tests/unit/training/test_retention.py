"""Which checkpoints a policy keeps."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from services.training.domain import Checkpoint, Retention
from services.training.retention import kept


def made(*fvus: float) -> list[Checkpoint]:
    """One every 100 tokens."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        Checkpoint(f"c{step}", step, 100 * step, fvu, f"artifact://checkpoint/{step}", 10, at)
        for step, fvu in enumerate(fvus, start=1)
    ]


def test_the_newest_the_best_and_one_of_every_so_many_tokens() -> None:
    found = made(0.9, 0.2, 0.3, 0.2, 0.5, 0.4)
    assert kept(found, Retention(2, 0, 0)) == {"c5", "c6"}
    assert kept(found, Retention(0, 0, 0)) == {"c6"}  # the training goes on from it
    assert kept(found, Retention(1, 1, 0)) == {"c4", "c6"}  # the later of two equal ones
    assert kept(found, Retention(1, 2, 0)) == {"c2", "c4", "c6"}
    assert kept(found, Retention(1, 0, 250)) == {"c3", "c5", "c6"}
    assert kept([], Retention()) == set()


@given(
    st.lists(st.floats(0, 1), max_size=20),
    st.builds(Retention, st.integers(0, 4), st.integers(0, 4), st.integers(0, 700)),
)
def test_twice_the_same_policy_deletes_nothing_more(fvus: list[float], retention: Retention) -> None:
    found = made(*fvus)
    names = kept(found, retention)
    assert kept([one for one in reversed(found) if one.id in names], retention) == names
    assert not found or found[-1].id in names
