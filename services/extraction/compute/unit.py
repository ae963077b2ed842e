"""Fill one unit: run its batches and put every row where it belongs in the shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from services.extraction.compute.buffers import Buffers
from services.extraction.compute.moments import Moments
from services.extraction.compute.pace import Pace
from services.extraction.compute.plan import Plan, Unit
from services.residency.families import Family, family_of
from services.residency.hooks import capture_hooks
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
    """Layout `rows`: one row per counted token in the unit's random order, or in the order of the batches."""

    def __init__(self, plan: Plan, unit: Unit) -> None:
        self.shape = (unit.rows,)
        order = permutation(unit.rows, plan.seed, "rows", unit.index) if plan.shuffled else np.arange(unit.rows)
        self._order = torch.from_numpy(order)
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
        memory: Buffers | None = None,
    ) -> None:
        self.unit = unit
        self._sequences = sequences
        self._plan = plan
        self._hook_points = tuple(hook_points)
        self._dtype = dtype
        self._pace = pace or Pace()
        self._memory = memory or Buffers()
        self._places: _Places = _Rows(plan, unit) if plan.layout == "rows" else _Grid(plan, unit)
        self._buffers: dict[str, Tensor] = {}
        self._filled = 0

    def run(self, model: nn.Module, family: Family, batch: Batch) -> int:
        """Forward one batch of the unit and keep its counted rows; returns how many they are."""
        ids, mask = map(torch.from_numpy, self._sequences.padded(batch.indices, batch.length))
        counted = self._counted_of(batch)
        places = self._places.take(batch, ids, counted)
        device = next(model.parameters()).device

        def forward(part: slice) -> None:
            low, rows = int(counted[: part.start].sum()), int(counted[part].sum())
            where = places[low : low + rows]
            chosen = None if bool(counted[part].all()) else counted[part].flatten().nonzero().flatten().to(device)
            on_the_way: dict[str, Tensor] = {}

            def see(name: str, tensor: Tensor) -> None:
                flat = tensor.flatten(0, 1)
                taken = self._flat(flat if chosen is None else flat.index_select(0, chosen))
                if device.type == "cpu":
                    self._keep(name, taken, where)
                else:
                    on_the_way[name] = _pinned(taken, self._dtype)

            with capture_hooks(model, family, self._hook_points) as hooks:
                hooks.watch(ids[part].to(device), mask[part].to(device), see)
            if on_the_way:
                torch.cuda.synchronize(device)
            for name, taken in on_the_way.items():
                self._keep(name, taken, where)

        for _ in self._pace.parts(len(ids), batch.length, forward, device.type):
            pass
        self._filled += len(places)
        return len(places)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The shard's tensors, as services.residency.shards describes them."""
        assert self._filled == self.unit.rows, f"{self._filled} of {self.unit.rows} rows are there"
        shaped = {name: buffer.view(*self._places.shape, -1) for name, buffer in self._buffers.items()}
        return {name: shaped[name] for name in self._hook_points} | self._places.tables()

    def moments(self) -> dict[str, Moments]:
        """Of the unit's rows as they are stored, by hook point: the same however its batches were split."""
        found = {}
        for name in self._hook_points:
            buffer = self._buffers[name]
            found[name] = Moments.empty(buffer.shape[-1])
            found[name].add(buffer, self._filled)
        return found

    def release(self) -> None:
        """Give the tensors' memory to the next unit; nobody may read them any more."""
        self._memory.give_back(self._buffers.values())
        self._buffers = {}

    def _flat(self, rows: Tensor) -> Tensor:
        """[N, d]; the keys of a pattern, [N, heads, keys], are padded with zeros to the longest sequence's."""
        if rows.dim() == 2:
            return rows
        return nn.functional.pad(rows, (0, self._plan.max_length - rows.shape[-1])).flatten(1)

    def _keep(self, name: str, rows: Tensor, places: Tensor) -> None:
        if name not in self._buffers:
            with torch.inference_mode(False):  # whoever trains on it may need it in a backward pass
                buffer = self._memory.take((math.prod(self._places.shape), rows.shape[-1]), self._dtype)
            # Layout `sequences` has places that no row takes.
            self._buffers[name] = buffer.zero_() if self._plan.layout == "sequences" else buffer
        self._buffers[name].index_copy_(0, places, rows.to(self._dtype))

    def _counted_of(self, batch: Batch) -> Tensor:
        counted = torch.zeros(len(batch.indices), batch.length, dtype=torch.bool)
        for row, index in enumerate(batch.indices):
            low, high = self._sequences.offsets[index : index + 2]
            counted[row, : high - low] = torch.from_numpy(self._plan.counted[low:high])
        return counted


def _pinned(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in memory that the GPU writes to by itself; it is there once the device is synchronized."""
    return torch.empty(rows.shape, dtype=dtype, pin_memory=True).copy_(rows, non_blocking=True)


def fill_units(
    model: nn.Module, sequences: Sequences, plan: Plan, *, hook_points: Sequence[str], dtype: torch.dtype
) -> Iterator[UnitFiller]:
    """Each unit of the plan, filled; `release` it once its tensors are written, and its memory is used again.

    Raises:
        UnknownHookPoint: a hook point does not exist in this model.
        UnsupportedModel: the model is of no known layout.
    """
    family, memory = family_of(model), Buffers()
    for unit in plan.units:
        filler = UnitFiller(sequences, plan, unit, hook_points, dtype, memory=memory)
        for batch in unit.batches:
            filler.run(model, family, batch)
        yield filler
