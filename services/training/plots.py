"""Pictures of a training and of an evaluation: PNG bytes from rows that are stored anyway."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from services.kit import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 120
DECADES = 8
"""The first bin of a density histogram starts at 10^-DECADES."""


def loss(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss of every coder over tokens, logarithmic."""
    figure, axes = _figure("tokens", "loss")
    for place, label in enumerate(_labels(points)):
        axes.plot(_tokens(points), [point["coders"][place]["loss"] for point in points], label=label)
    axes.set_yscale("log")
    return _png(figure, axes)


def fvu(points: Sequence[Mapping[str, Any]]) -> bytes:
    """FVU of every coder's prefixes over tokens; the whole dictionary is the thick line."""
    figure, axes = _figure("tokens", "FVU of the batch")
    for place, label in enumerate(_labels(points)):
        curves = list(zip(*(point["coders"][place]["fvu_per_prefix"] for point in points), strict=True))
        for number, curve in enumerate(curves, start=1):
            whole = number == len(curves)
            axes.plot(
                _tokens(points),
                curve,
                color=f"C{place}",
                linewidth=2.0 if whole else 0.8,
                alpha=0.3 + 0.7 * number / len(curves),
                label=f"{label}, {number} prefixes" if whole else None,
            )
    axes.set_yscale("log")
    return _png(figure, axes)


def density(histogram: Sequence[int]) -> bytes:
    """Latents by how often they are active, a bar a decade."""
    figure, axes = _figure("part of the tokens, 10^x", "latents")
    axes.bar([place - DECADES + 0.5 for place in range(len(histogram))], histogram, width=0.9)
    return _png(figure, axes)


def _labels(points: Sequence[Mapping[str, Any]]) -> list[str]:
    coders = points[0]["coders"] if points else []
    return [f"layer {coder['layer']}" for coder in coders]


def _tokens(points: Sequence[Mapping[str, Any]]) -> list[int]:
    return [point["tokens_seen"] for point in points]


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra; no global state, unlike pyplot
    except ImportError as error:
        raise errors.Unsupported("plots need matplotlib, which lensmesh[device] installs") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _png(figure: Figure, axes: Axes) -> bytes:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": "lensmesh"})
    return written.getvalue()
