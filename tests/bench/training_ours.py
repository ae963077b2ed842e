"""Our own coder as a contestant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from services.training.compute import TrainConfig
from services.training.compute.coder import Coder
from tests.bench.training_contestants import BATCH, WIDTHS, Race


class Ours:
    """A coder with the engine's defaults."""

    def __init__(self, race: Race, widths: tuple[int, ...] = WIDTHS, **changes: Any) -> None:
        config = TrainConfig(
            dict_size=race.dict_size,
            group_sizes=[b - a for a, b in pairwise((0, *widths))],
            top_k=race.top_k,
            batch_size=BATCH,
            num_tokens=race.steps * BATCH,
            **{"learning_rate": race.learning_rate, **changes},
        )
        self._coder = Coder.start("ours", config.resolved(race.y.shape[1]), race.x, race.y)
        self._bare: Any = None

    def step(self, x: Tensor, y: Tensor) -> object:
        self._bare = None
        return self._coder.step(x, y)

    def codes(self, x: Tensor) -> Tensor:
        self._bare = self._bare or self._coder.transcoder()
        return self._bare.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self._bare.decode(codes)


OURS: dict[str, Callable[[Race], Any]] = {
    "ours": Ours,
    "ours, 1 prefix": lambda race: Ours(race, WIDTHS[-1:]),
    "ours, batch_topk": lambda race: Ours(race, activation="batch_topk"),
    "ours, jumprelu": lambda race: Ours(race, activation="jumprelu"),
}
