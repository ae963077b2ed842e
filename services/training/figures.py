"""Figures of several coders as one set under API.md's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from services.training.dialogue import Progress
from services.training.domain import Plan

_MEANS = (
    "learning_rate", "loss", "l2_loss", "aux_loss", "fvu", "fvu_min", "fvu_max", "fvu_mean", "l0", "dead_fraction",
    "gradient_norm",
)  # fmt: skip
_OF_CODER = (*_MEANS[1:], "fvu_per_prefix", "l0_per_prefix", "seconds", "share", "tokens_per_second")


def figures_of(progress: Progress, plan: Plan) -> dict[str, Any]:
    """Means over coders, and the same by coder, of the last step that was told; plain JSON.

    Values per prefix have a mean only where all coders have as many prefixes; else they stand with the coders alone.
    """
    coders = progress.coders
    layers = {coder.name: coder.layer for coder in plan.coders}
    return {
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "num_tokens": plan.num_tokens,
        "tokens_per_second": progress.tokens_per_second,
        "coder_tokens_per_second": progress.tokens_per_second * len(coders),
        "eta_seconds": progress.eta_seconds,
        **{name: _mean(coder[name] for coder in coders) for name in _MEANS},
        **{name: _means([coder[name] for coder in coders]) for name in ("fvu_per_prefix", "l0_per_prefix")},
        "coders": [
            {"name": coder["coder"], "layer": layers[coder["coder"]], **_part(coder, _OF_CODER)} for coder in coders
        ],
    }


def _part(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _means(of_coders: Sequence[Sequence[float]]) -> list[float]:
    if len({len(values) for values in of_coders}) > 1:
        return []
    return [_mean(values) for values in zip(*of_coders, strict=True)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
