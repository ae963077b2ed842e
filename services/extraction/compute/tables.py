"""The small tables of a cache beside its shards: where rows come from, statistics, hook points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from services.extraction.compute.moments import Moments
from services.extraction.compute.plan import Plan
from services.residency.families import site_of
from services.residency.shards import HookPointEntry
from services.residency.texts import Sequences


def sequence_tensors(sequences: Sequences, plan: Plan) -> dict[str, Tensor]:
    """Tensors of sequences.safetensors."""
    batch_of = torch.full((len(sequences),), -1, dtype=torch.int32)
    for unit in plan.units:
        for number, batch in enumerate(unit.batches, unit.first_batch):
            batch_of[torch.from_numpy(batch.indices)] = number
    rows, starts, firsts = map(np.ascontiguousarray, sequences.pieces)
    tensors = {
        "row": torch.from_numpy(rows),
        "start": torch.from_numpy(starts),
        "first": torch.from_numpy(firsts),
        "offset": torch.from_numpy(sequences.offsets),
        "ids": torch.from_numpy(sequences.ids),
        "batch": batch_of,
    }
    return tensors if sequences.spans is None else tensors | {"span": torch.from_numpy(sequences.spans)}


def merged(parts: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Moments of all units by hook point; `parts` come in the order of the units, which decides the last bits."""
    whole: dict[str, Moments] = {}
    for part in parts:
        for name, moments in part.items():
            whole.setdefault(name, Moments.empty(len(moments.total))).merge(moments)
    return whole


def statistics_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Tensors of statistics.safetensors."""
    means = {f"{name}.mean": found.mean for name, found in moments.items()}
    return means | {f"{name}.second_moment": found.second_moment for name, found in moments.items()}


def hook_point_entries(moments: Mapping[str, Moments]) -> tuple[HookPointEntry, ...]:
    """The manifest's hook points, in the order of `moments`."""
    entries = []
    for name, found in moments.items():
        layer, site = site_of(name)
        entries.append(HookPointEntry(name, site, layer, len(found.total), found.mean_norm, found.variance))
    return tuple(entries)
