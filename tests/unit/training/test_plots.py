from __future__ import annotations

import io

from matplotlib.image import imread

from services.training import plots

POINTS = [
    {
        "tokens_seen": 1000 * step,
        "coders": [
            {"layer": layer, "loss": 1.0 / step, "fvu_per_prefix": [0.9 / step, 0.5 / step, 0.2 / step]}
            for layer in (1, 3)
        ],
    }
    for step in range(1, 20)
]


def ink(png: bytes) -> float:
    """Part of a picture that is not white."""
    return float((imread(io.BytesIO(png), format="png")[..., :3] < 1).any(-1).mean())


def test_pictures_show_what_they_are_of() -> None:
    empty = ink(plots.fvu([]))
    assert ink(plots.fvu(POINTS)) > empty
    assert ink(plots.loss(POINTS)) > ink(plots.loss([]))
    assert ink(plots.density([0, 0, 5, 40, 90, 30, 3, 0, 0])) > ink(plots.density([0] * 9)) + 0.05


def test_a_coder_more_is_a_curve_more() -> None:
    one = [{**point, "coders": point["coders"][:1]} for point in POINTS]
    assert plots.fvu(one) != plots.fvu(POINTS)
    assert plots.fvu(POINTS) == plots.fvu(POINTS)  # the same rows, the same bytes
