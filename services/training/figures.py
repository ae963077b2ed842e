"""Figures of several coders as one set under API.md's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from services.training.dialogue import Progress
from services.training.domain import Plan

_MEANS = ("loss", "l2_loss", "aux_loss", "fvu", "fvu_min", "fvu_max", "fvu_mean", "l0", "dead_fraction")
_OF_CODER = ("loss", "l2_loss", "aux_loss", "fvu", "fvu_per_prefix", "l0", "dead_fraction", "gradient_norm", "seconds")


def figures_of(progress: Progress, plan: Plan) -> dict[str, Any]:
    """Means over coders, and the same by coder, of the last step that was told; plain JSON.

    Values per prefix have a mean only where all coders have as many prefixes; else they stand with the coders alone.
    """
    coders = progress.coders
    layers = {coder.name: coder.layer for coder in plan.coders}
    per_prefix = [coder["fvu_per_prefix"] for coder in coders]
    same = len({len(values) for values in per_prefix}) == 1
    return {
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "num_tokens": plan.num_tokens,
        "tokens_per_second": progress.tokens_per_second,
        "eta_seconds": progress.eta_seconds,
        "learning_rate": _mean(coder["learning_rate"] for coder in coders),
        **{name: _mean(coder[name] for coder in coders) for name in _MEANS},
        "fvu_per_prefix": [_mean(values) for values in zip(*per_prefix, strict=True)] if same else [],
        "coders": [{"layer": layers[coder["coder"]], **_part(coder, _OF_CODER)} for coder in coders],
    }


def _part(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
