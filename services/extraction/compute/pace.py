"""How many sequences of a batch run at once: fewer where memory is short. Their padded length stays the batch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from services.residency.families import Facts
from services.residency.memory import give_back, is_out_of_memory

T = TypeVar("T")
SHARE = 0.5
"""Part of the memory left that a forward pass may plan to take."""
LEAST_TOKENS = 64
"""Tokens, padding included, below which a batch is not cut: matrix products of a few rows round otherwise on a CPU."""


def bytes_at_work(known: Facts, itemsize: int) -> int:
    """Bytes that one token takes while it passes a layer: the residual stream, the attention and the MLP inside."""
    heads = (known.num_heads + 2 * known.num_kv_heads) * known.head_dim
    return itemsize * (6 * known.hidden_size + 2 * heads + 3 * known.intermediate_size)


def fits(free_bytes: int, token_bytes: int) -> bool:
    """Whether the smallest forward pass may be tried with so much memory left."""
    return free_bytes * SHARE >= LEAST_TOKENS * token_bytes


class Pace:
    """Starts from the memory left and halves when it runs out; one for all batches of a job.

    Attributes:
        latest: sequences of the latest forward pass.
        halved: how often memory ran out.
    """

    def __init__(self, free_bytes: int | None = None, token_bytes: int = 1) -> None:
        """Plan with memory.

        Args:
            free_bytes: what is left of the device; None plans nothing, and whole batches are tried.
            token_bytes: what a token takes on its way through the model.
        """
        self.latest = 0
        self.halved = 0
        self._tokens = None if free_bytes is None else int(free_bytes * SHARE) // token_bytes

    def parts(self, count: int, length: int, run: Callable[[slice], T], device: str) -> Iterator[T]:
        """What `run` makes of the sequences of a batch, part by part, each as large as memory allows.

        Args:
            count: sequences of the batch.
            length: their padded length.
            run: runs those at a slice; it is called again with half of them when memory runs out in it.
            device: where that memory is.

        Raises:
            Exception: of `run`; that memory ran out only where `LEAST_TOKENS` do not fit.
        """
        low = 0
        while low < count:
            rows = _even(count - low, self._most(length, count))
            failed = False
            try:
                found = run(slice(low, low + rows))
            except Exception as error:
                if rows <= _least(length) or not is_out_of_memory(error):
                    raise
                failed = True  # the error's frames hold the tensors of the pass: free them before the next try
            if failed:
                self.halved += 1
                self._tokens = rows // 2 * length
                give_back(device)
                continue
            self.latest = rows
            low += rows
            yield found

    def _most(self, length: int, count: int) -> int:
        if self._tokens is None:
            return count
        return max(_least(length), self._tokens // length)


def _least(length: int) -> int:
    return math.ceil(LEAST_TOKENS / length)


def _even(count: int, most: int) -> int:
    """The first of as few parts as possible that are about as large as one another."""
    return math.ceil(count / math.ceil(count / most))
