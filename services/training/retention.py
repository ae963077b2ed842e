"""Which checkpoints of a training are kept."""

from __future__ import annotations

from collections.abc import Sequence

from services.training.domain import Checkpoint, Retention


def kept(checkpoints: Sequence[Checkpoint], retention: Retention) -> set[str]:
    """Ids of those that are kept: the newest, the best by FVU, and the first of every so many tokens.

    The newest one always is, since the training goes on from it. What is kept once stays so while nothing newer or
    better comes: to apply the same policy twice deletes nothing the second time.
    """
    in_order = sorted(checkpoints, key=lambda one: one.step)
    by_fvu = sorted(in_order, key=lambda one: (one.fvu, -one.step))
    found = {one.id for one in in_order[-max(1, retention.last) :]} | {one.id for one in by_fvu[: retention.best]}
    if retention.every_tokens:
        before = 0
        for one in in_order:
            if one.tokens_seen // retention.every_tokens > before:
                found.add(one.id)
            before = max(before, one.tokens_seen // retention.every_tokens)
    return found
