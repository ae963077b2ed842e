"""Held-out FVU at equal dictionary, k, rows and order; each program in turn, from the same file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.training_contestants import BATCH
from tests.bench.training_run import Worker, python_of

RIVALS = ("sparsify, 1 prefix", "plain autograd", "plain autograd, 1 prefix", "dictionary-learning", "SAELens")
OURS = ("ours", "ours, 1 prefix", "ours, batch_topk", "ours, jumprelu")
RATES = (None, 2.4e-3)
"""A rival is tried with its own learning rate and with ours, on the fewest tokens; the better one runs on."""


def quality(rows: Path, peers: Path, tokens: Sequence[int], names: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """A row per program, number of tokens and learning rate; printed as they come."""
    found, best = [], dict.fromkeys(names)
    for count in tokens:
        for name in names:
            tried = []
            for rate in RATES if count == tokens[0] and name in RIVALS else [best[name]]:
                one = trained(name, rows, peers, tokens=count, rate=rate, threads=threads)
                _print(one)
                tried.append(one)
            best[name] = min(tried, key=lambda one: one["fvu_per_prefix"][-1])["learning_rate"]
            found += tried
    return found


def trained(name: str, rows: Path, peers: Path, *, tokens: int, rate: float | None, threads: int) -> dict[str, Any]:
    """One program from its beginning to `tokens` rows, and its judgement."""
    steps, begin = -(-tokens // BATCH), time.perf_counter()
    worker = Worker(name, python_of(name, peers), rows, steps=steps, threads=threads, rate=rate)
    median = worker.ask(steps=steps)["seconds"]
    answer = worker.ask(judge=True)
    worker.close()
    figures = {"name": name, "tokens": steps * BATCH, "learning_rate": rate, "step_ms": 1e3 * median}
    return figures | answer | {"seconds": time.perf_counter() - begin}


def _print(one: dict[str, Any]) -> None:
    rate = "own rate" if one["learning_rate"] is None else f"rate {one['learning_rate']:.1e}"
    prefixes = " ".join(f"{fvu:.4f}" for fvu in one["fvu_per_prefix"])
    sys.stdout.write(
        f"{one['name']:26s} {one['tokens']:9,d} tokens {rate:13s} FVU per prefix {prefixes}  L0 {one['l0']:5.1f}  "
        f"dead {100 * one['dead']:5.2f} %  {one['step_ms']:6.1f} ms  {one['seconds']:5.0f} s\n"
    )
    sys.stdout.flush()
