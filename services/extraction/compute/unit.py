"""Fill one unit: run its batches and put every row where it belongs in the shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from services.extraction.compute.capture import capture_tokens
from services.extraction.compute.moments import Moments
from services.extraction.compute.pace import Pace
from services.extraction.compute.plan import Plan, Unit
from services.residency.families import Family, family_of
from services.residency.shuffle import permutation
from services.residency.texts import Batch, Sequences


class _Places(Protocol):
    """Where the rows of a unit go, and the tables that say what they are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the hook points' tensors, their width left out."""

    def take(self, batch: Batch, ids: Tensor, counted: Tensor) -> Tensor:
        """Places of the batch's counted tokens, int64 [rows]; `ids` int64 and `counted` bool are [B, S]."""

    def tables(self) -> dict[str, Tensor]:
        """The tensors beside the hook points' once every batch was taken."""


class _Rows:
    """Layout `rows`: one row per counted token in the unit's random order."""

    def __init__(self, plan: Plan, unit: Unit) -> None:
        self.shape = (unit.rows,)
        self._order = torch.from_numpy(permutation(unit.rows, plan.seed, "rows", unit.index))
        self._taken = 0
        self._tok, self._seq, self._pos = (torch.zeros(unit.rows, dtype=torch.int32) for _ in range(3))

    def take(self, batch: Batch, ids: Tensor, counted: Tensor) -> Tensor:
        row, column = counted.nonzero().unbind(1)
        places = self._order[self._taken : self._taken + len(row)]
        self._taken += len(row)
        self._tok[places] = ids[row, column].int()
        self._seq[places] = torch.from_numpy(batch.indices)[row].int()
        self._pos[places] = column.int()
        return places

    def tables(self) -> dict[str, Tensor]:
        return {"tok": self._tok, "seq": self._seq, "pos": self._pos}


class _Grid:
    """Layout `sequences`: every sequence of the unit in its order, padded to the longest of the whole plan."""

    def __init__(self, plan: Plan, unit: Unit) -> None:
        self.shape = (len(unit.sequences), plan.max_length)
        self._sequences = unit.sequences
        self._tok = torch.zeros(self.shape, dtype=torch.int32)
        self._mask = torch.zeros(self.shape, dtype=torch.uint8)

    def take(self, batch: Batch, ids: Tensor, counted: Tensor) -> Tensor:
        local = torch.from_numpy(np.searchsorted(self._sequences, batch.indices))
        self._tok[local, : batch.length] = ids.int()
        self._mask[local, : batch.length] = counted.to(torch.uint8)
        row, column = counted.nonzero().unbind(1)
        return local[row] * self.shape[1] + column

    def tables(self) -> dict[str, Tensor]:
        seq = torch.from_numpy(self._sequences.astype(np.int32))
        return {"tok": self._tok, "mask": self._mask, "seq": seq}


class UnitFiller:
    """A unit that is being filled; `run` each of its batches once, in their order, then read `tensors`.

    Attributes:
        unit: which one.
        moments: of the rows so far, by hook point, as they are stored.
    """

    def __init__(
        self,
        sequences: Sequences,
        plan: Plan,
        unit: Unit,
        hook_points: Sequence[str],
        dtype: torch.dtype,
        *,
        pace: Pace | None = None,
    ) -> None:
        self.unit = unit
        self.moments: dict[str, Moments] = {}
        self._sequences = sequences
        self._counted = plan.counted
        self._max_length = plan.max_length
        self._hook_points = tuple(hook_points)
        self._dtype = dtype
        self._pace = pace or Pace()
        self._places: _Places = _Rows(plan, unit) if plan.layout == "rows" else _Grid(plan, unit)
        self._buffers: dict[str, Tensor] = {}
        self._filled = 0

    def run(self, model: nn.Module, family: Family, batch: Batch) -> int:
        """Forward one batch of the unit and keep its counted rows; returns how many they are."""
        ids, mask = map(torch.from_numpy, self._sequences.padded(batch.indices, batch.length))
        counted = self._counted_of(batch)
        device = next(model.parameters()).device

        def forward(part: slice) -> dict[str, Tensor]:
            chosen = None if bool(counted[part].all()) else counted[part].flatten().nonzero().flatten().to(device)
            return capture_tokens(model, family, self._hook_points, ids=ids[part], mask=mask[part], chosen=chosen)

        parts = list(self._pace.parts(len(ids), batch.length, forward, device.type))
        places = self._places.take(batch, ids, counted)
        for name in parts[0]:
            found = [self._flat(part[name]).to("cpu", self._dtype) for part in parts]
            # Rows are summed as one batch, however many parts it ran in: the grouping decides the sums' last bits.
            self._keep(name, found[0] if len(found) == 1 else torch.cat(found), places)
        self._filled += len(places)
        return len(places)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The shard's tensors, as services.residency.shards describes them."""
        assert self._filled == self.unit.rows, f"{self._filled} of {self.unit.rows} rows are there"
        shaped = {name: buffer.view(*self._places.shape, -1) for name, buffer in self._buffers.items()}
        return shaped | self._places.tables()

    def _flat(self, rows: Tensor) -> Tensor:
        """[N, d]; the keys of a pattern, [N, heads, keys], are padded with zeros to the longest sequence's."""
        if rows.dim() == 2:
            return rows
        return nn.functional.pad(rows, (0, self._max_length - rows.shape[-1])).flatten(1)

    def _keep(self, name: str, rows: Tensor, places: Tensor) -> None:
        if name not in self._buffers:
            width = rows.shape[-1]
            self.moments[name] = Moments.empty(width)
            self._buffers[name] = torch.zeros(int(np.prod(self._places.shape)), width, dtype=self._dtype)
        self.moments[name].add(rows)
        self._buffers[name].index_copy_(0, places, rows)

    def _counted_of(self, batch: Batch) -> Tensor:
        counted = torch.zeros(len(batch.indices), batch.length, dtype=torch.bool)
        for row, index in enumerate(batch.indices):
            low, high = self._sequences.offsets[index : index + 2]
            counted[row, : high - low] = torch.from_numpy(self._counted[low:high])
        return counted


def fill_units(
    model: nn.Module, sequences: Sequences, plan: Plan, *, hook_points: Sequence[str], dtype: torch.dtype
) -> Iterator[tuple[Unit, dict[str, Tensor], dict[str, Moments]]]:
    """Each unit of the plan with its shard's tensors and its moments by hook point.

    Raises:
        UnknownHookPoint: a hook point does not exist in this model.
        UnsupportedModel: the model is of no known layout.
    """
    family = family_of(model)
    for unit in plan.units:
        filler = UnitFiller(sequences, plan, unit, hook_points, dtype)
        for batch in unit.batches:
            filler.run(model, family, batch)
        yield unit, filler.tensors, filler.moments
