"""The rows of an activation cache as the trainer's source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.residency.shards import ShardReader
from services.training.compute.batches import Pairs


class CacheRows:
    """Implements `Source` on mapped shards; every file is checked against its digest at first use."""

    def __init__(self, folder: Path, pairs: Mapping[str, tuple[str, str]]) -> None:
        """Open a cache.

        Args:
            folder: the cache's directory.
            pairs: by pair's name, the hook points of its inputs and its targets.

        Raises:
            CorruptCache: the manifest is missing or not valid.
            KeyError: the cache does not hold a hook point.
        """
        self._reader = ShardReader(folder)
        self._pairs = pairs
        manifest = self._reader.manifest
        self._widths = {name: (manifest.width(x), manifest.width(y)) for name, (x, y) in pairs.items()}

    @property
    def _points(self) -> list[str]:
        return list(dict.fromkeys(point for pair in self._pairs.values() for point in pair))

    @property
    def rows(self) -> int:
        """Counted tokens."""
        return self._reader.manifest.tokens

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Widths by pair."""
        return self._widths

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Rows mixed from several shards at a time."""
        for batch in self._reader.iter_rows(self._points, batch_size, seed, start):
            yield {name: (batch.rows[x], batch.rows[y]) for name, (x, y) in self._pairs.items()}

    def facts_of(self, pair: str, rows: int, seed: int, start: int) -> dict[str, Any]:
        """Figures of the `rows` rows after `start`, and the first row that is not finite: its shard and place there."""
        names = self._pairs[pair]
        facts = {"position": start, **figures_of_rows(*next(self.batches(rows, seed, start))[pair])}
        for index in self._reader.drawn_from(seed, start):
            found = self._reader.shard(index, names)
            bad = torch.cat([found[name].flatten(0, -2) for name in names], 1).isfinite().all(1).logical_not().nonzero()
            if len(bad):
                return facts | {"shard": self._reader.manifest.shards[index].name, "shard_row": int(bad[0])}
        return facts


def figures_of_rows(x: Tensor, y: Tensor) -> dict[str, Any]:
    """How many there are, and of x and y: values that are not finite, smallest and largest of the others."""
    facts: dict[str, Any] = {"rows": len(x)}
    for side, tensor in (("x", x), ("y", y)):
        finite = tensor[tensor.isfinite()].float()
        facts[f"non_finite_{side}"] = tensor.numel() - finite.numel()
        if finite.numel():
            facts |= {f"min_{side}": float(finite.min()), f"max_{side}": float(finite.max())}
    return facts
