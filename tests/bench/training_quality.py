"""Held-out FVU at equal dictionary, k, rows and order; each program in turn, from the same file.

FVU and L0 are those of files nobody trained on; "same text" are rows of the trained text that were left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.training.compute.config import default_learning_rate
from tests.bench.training_contestants import BATCH, DICT_SIZE
from tests.bench.training_run import Worker, python_of

RIVALS = ("sparsify, 1 prefix", "plain autograd", "plain autograd, 1 prefix", "dictionary-learning", "SAELens")
OURS = ("ours", "ours, 1 prefix", "ours, batch_topk", "ours, jumprelu")
RULES = ("own", "ours")
"""A rival is tried with its own rule for the learning rate and with ours, on the fewest tokens; the better runs on."""


def quality(rows: Path, peers: Path, tokens: Sequence[int], names: Sequence[str], threads: int) -> dict[str, Any]:
    """A row per program, number of tokens and learning rate, and what nesting is good for; printed as they come."""
    found, cut_off, best = [], [], dict.fromkeys(names, "own")
    for count in tokens:
        begin = len(found)
        for name in names:
            tried = []
            for rule in RULES if count == tokens[0] and name in RIVALS else [best[name]]:
                one = trained(name, rows, peers, tokens=count, rule=rule, threads=threads)
                _print(one)
                tried.append(one)
            best[name] = min(tried, key=lambda one: one["fvu_per_prefix"][-1])["rule"]
            found += tried
        cut_off += against_cut_off(found[begin:])
    return {"programs": found, "against_cut_off": cut_off}


def against_cut_off(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each prefix of ours is below an un-nested coder cut off there, after as many tokens; printed.

    Cut off as it is, and with its strongest latents put first, which is the best that can be done without nesting. Of
    the last prefix nothing is cut off: it tells what nesting costs.
    """
    rows = []
    for ours in (one for one in found if one["name"] in OURS and "strongest_first" not in one):
        for plain in (one for one in found if "strongest_first" in one):
            for how, cut in (("as it is", plain["fvu_per_prefix"]), ("strongest first", plain["strongest_first"])):
                lower = [1 - fvu / other for fvu, other in zip(ours["fvu_per_prefix"], cut, strict=True)]
                rows.append({"ours": ours["name"], "plain": plain["name"], "rule": plain["rule"], "cut": how})
                rows[-1] |= {"tokens": ours["tokens"], "fvu_per_prefix": cut, "lower": lower}
                sys.stdout.write(
                    f"{ours['name']:16s} below {plain['name']:24s} {plain['rule']:4s} rate, cut off {how:15s} by "
                    f"{' '.join(f'{100 * part:5.1f} %' for part in lower)}   (but for the last >= 10 %: "
                    f"{'yes' if min(lower[:-1]) >= 0.1 else 'no'})\n"
                )
    return rows


def trained(name: str, rows: Path, peers: Path, *, tokens: int, rule: str, threads: int) -> dict[str, Any]:
    """One program from its beginning to `tokens` rows, and its judgement."""
    steps, begin = -(-tokens // BATCH), time.perf_counter()
    rate = None if rule == "own" else default_learning_rate(DICT_SIZE, steps)
    worker = Worker(name, python_of(name, peers), rows, steps=steps, threads=threads, rate=rate)
    median = worker.ask(steps=steps)["seconds"]
    answer = worker.ask(judge=True)
    worker.close()
    figures = {"name": name, "tokens": steps * BATCH, "rule": rule, "step_ms": 1e3 * median}
    return figures | answer | {"seconds": time.perf_counter() - begin}


def _print(one: dict[str, Any]) -> None:
    prefixes, same = " ".join(f"{fvu:.4f}" for fvu in one["fvu_per_prefix"]), one["same_text"]
    sys.stdout.write(
        f"{one['name']:26s} {one['tokens']:9,d} tokens {one['rule']:4s} rate  FVU per prefix {prefixes}  "
        f"L0 {one['l0']:5.1f}  dead {100 * one['dead']:5.2f} %  same text: FVU {same['fvu_per_prefix'][-1]:.4f} "
        f"L0 {same['l0']:5.1f}  {one['step_ms']:6.1f} ms  {one['seconds']:5.0f} s\n"
    )
    sys.stdout.flush()
