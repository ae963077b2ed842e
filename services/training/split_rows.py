"""Rows of a model that is split over the training's own devices: computed in its process, while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from services.residency.failures import for_callers
from services.residency.families import facts, family_of, site_of
from services.residency.hooks import capture_hooks
from services.residency.identity import check_identity
from services.residency.shuffle import permutation
from services.residency.split import load_split
from services.residency.texts import plan_batches
from services.residency.tokens import TokenStore
from services.training.cache_rows import figures_of_rows
from services.training.compute.batches import Pairs, evenly
from services.training.dialogue import Split

POOL_BYTES: Final = 128 * 2**20
"""Rows that are computed and mixed at a time."""
POOLS_AT_ONCE: Final = 3
"""Of a pool: what was captured, the same in one piece, and mixed."""
TOKENS: Final = "tokens"
"""Name of the dataset's tokens in `Split.folder`."""


def pool_bytes(rows: int, row_bytes: int) -> int:
    """Bytes of one pool of a dataset."""
    return min(POOL_BYTES, rows * row_bytes)


class SplitRows:
    """Implements `Source`; seed and position alone decide the rows, of which none before `start` is computed again."""

    def __init__(self, split: Split, pairs: Mapping[str, tuple[str, str]], device: str) -> None:
        """Load the model, and check that what it captures are MLP's inputs and outputs.

        Args:
            split: of what, and over which devices.
            pairs: by pair's name, the hook points of its inputs and its targets.
            device: where rows are wanted.

        Raises:
            errors.Failed: `HOOK_IDENTITY_FAILED`: a captured pair is no input and output of its MLP;
                `MODEL_LOAD_FAILED`: the model's files are not right.
            errors.Exhausted: `DEVICE_OOM`.
        """
        sequences = TokenStore(Path(split.folder)).load(TOKENS)
        if sequences is None:
            raise ValueError("the dataset's tokens are gone")
        self._sequences, self._uncounted = sequences, torch.tensor(split.uncounted, dtype=torch.int64)
        self._counted = sequences.totals(sequences.counted(split.uncounted))
        self._first, self._device, self._pairs = split.devices[0], device, pairs
        with for_callers():
            self._model = load_split(Path(split.directory), split.quantization, split.spread, split.devices)
            self._family, known = family_of(self._model), facts(self._model.config.to_dict())
            self._batch_size, self._width = known.model_batch_size, known.hidden_size
            self._check()
        self._points = list(dict.fromkeys(point for pair in pairs.values() for point in pair))
        row_bytes = len(self._points) * self._width * self._model.dtype.itemsize
        self._pool_rows = max(1, pool_bytes(self.rows, row_bytes) // row_bytes)

    @property
    def rows(self) -> int:
        """Of one pass."""
        return int(self._counted.sum())

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """All sites that are trained on are as wide as the residual stream."""
        return dict.fromkeys(self._pairs, (self._width, self._width))

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Every pass takes the sequences in another order, a pool of them at a time, whose rows are mixed."""
        return evenly(self._pools(seed, start), batch_size)

    def facts_of(self, pair: str, rows: int, seed: int, start: int) -> dict[str, Any]:
        """Figures of the `rows` rows after `start`."""
        return {"position": start, **figures_of_rows(*next(self.batches(rows, seed, start))[pair])}

    def _pools(self, seed: int, start: int) -> Iterator[Pairs]:
        number, skip = divmod(start, self.rows)
        while True:
            order = permutation(len(self._counted), seed, "pass", number)
            ends = np.cumsum(self._counted[order])
            for pool in np.split(order, np.flatnonzero(np.diff((ends - 1) // self._pool_rows)) + 1):
                rows = int(self._counted[pool].sum())
                if skip < rows:
                    mixed = permutation(rows, seed, "rows", number, int(pool[0]))[skip:]
                    found, mixed = self._captured(pool), torch.from_numpy(mixed).to(self._device)
                    yield {name: (found[x][mixed], found[y][mixed]) for name, (x, y) in self._pairs.items()}
                skip = max(0, skip - rows)
            number += 1

    def _captured(self, pool: np.ndarray) -> dict[str, Tensor]:
        """By hook point, the counted rows of these sequences [rows, d], on the device that wants them."""
        parts: dict[str, list[Tensor]] = {point: [] for point in self._points}
        with capture_hooks(self._model, self._family, self._points) as capture:
            for batch in plan_batches(self._sequences.lengths, self._batch_size, pool):
                ids, mask = self._padded(batch.indices, batch.length)
                counted = mask.bool() & ~torch.isin(ids, self._uncounted.to(ids.device))

                def take(tensor: Tensor, counted: Tensor = counted) -> Tensor:
                    return tensor[counted.to(tensor.device)].to(self._device)

                for point, rows in capture.run(ids, mask, take).items():
                    parts[point].append(rows)
        return {point: torch.cat(rows) for point, rows in parts.items()}

    def _check(self) -> None:
        """On the longest sequences, as everywhere before a training or an extraction starts."""
        sites = [(site_of(x), site_of(y)) for x, y in self._pairs.values()]
        layers = [layer for (layer, source), (_, target) in sites if (source, target) == ("mlp_in", "mlp_out")]
        if layers:
            batch = plan_batches(self._sequences.lengths, self._batch_size)[0]
            check_identity(self._model, self._family, layers, *self._padded(batch.indices, batch.length))

    def _padded(self, indices: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        ids, mask = map(torch.from_numpy, self._sequences.padded(indices, length))
        return ids.to(self._first), mask.to(self._first)
