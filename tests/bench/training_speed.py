"""Milliseconds of a step: every program alive at once in a process of its own, taking turns at the same rows."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.training_contestants import REFERENCES
from tests.bench.training_peers import PEERS
from tests.bench.training_run import Worker, python_of

NAMES = (*REFERENCES, "ours, 1 prefix", "ours", *PEERS)
RUN_STEPS = 977
"""Of the run whose first steps are measured, 2,000,000 tokens: schedules and windows are not those of a tiny one."""
TURN = 3
"""Steps a turn; the first of a turn finds the caches full of others' data, the median does not."""
RATIOS = (
    ("ours / encode + top-k", "ours", "encode + top-k", "<= 1.3"),
    ("ours / encoder product", "ours", "encoder product", "1.5 is aimed at"),
    ("4 prefixes / 1 prefix", "ours", "ours, 1 prefix", "<= 1.25"),
    ("sparsify un-nested / ours", "sparsify, 1 prefix", "ours", ">= 1.6"),
    ("plain autograd / ours", "plain autograd", "ours", ">= 4"),
    ("dictionary-learning / ours", "dictionary-learning", "ours", ""),
    ("SAELens / ours", "SAELens", "ours", ">= 8"),
)


def speed(rows: Path, peers: Path, names: Sequence[str], *, turns: int, threads: int) -> dict[str, Any]:
    """Median milliseconds by program, and the ratios the programs allow; printed."""
    workers = [Worker(name, python_of(name, peers), rows, steps=RUN_STEPS, threads=threads) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for turn in range(turns + 1):  # the first one warms up
        for worker in workers:
            answer = worker.ask(steps=TURN)
            peaks[worker.name] = answer["peak_bytes"]
            if turn:
                times[worker.name].append(1e3 * answer["seconds"])
    for worker in workers:
        worker.close()
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, value in found.items():
        sys.stdout.write(f"{name:28s} {value:8.1f} ms   (best {min(times[name]):.1f})\n")
    ratios = {}
    for label, above, below, wanted in RATIOS:
        if above in found and below in found:
            ratios[label] = found[above] / found[below]
            sys.stdout.write(f"{label:28s} {ratios[label]:8.2f}      {wanted}\n")
    return {"milliseconds": found, "best": {name: min(values) for name, values in times.items()}, "ratios": ratios}
