"""How a dataset is cut into units and batches: the same on every machine, so that work can be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from services.residency.shards import Layout
from services.residency.shuffle import permutation
from services.residency.texts import Batch, Sequences, plan_batches

UNIT_BYTES = 256 * 2**20
UNIT_ROWS = 1_000_000
UNIT_SHARE = 0.05
UNIT_SEQUENCES = 64
MOST_UNIT_BYTES = 4 * UNIT_BYTES
WINDOW = 1024
"""Sequences that are sorted by length together."""
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
"""Tokens of a forward pass from which on it only grows slower: on a CPU its tensors leave the caches."""


class NothingCounted(ValueError):
    """Every token is a special one: there is no row to extract."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes one shard and is done whole or not at all.

    Attributes:
        index: from 0.
        sequences: indices into the sequences, int64 [n], ascending.
        batches: forward passes; together they hold every sequence of the unit once. In layout `rows` a sequence of
            special tokens alone is in none.
        first_batch: number of the first of them within the plan.
        rows: counted tokens.
    """

    index: int
    sequences: np.ndarray
    batches: tuple[Batch, ...]
    first_batch: int
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Units and batches of an extraction.

    Attributes:
        layout, seed, batch_size, batch_tokens, uncounted_ids, shuffled: what it was made with.
        units: in order.
        counted: whether each of the sequences' tokens is a row, bool [tokens].
        tokens: counted tokens.
        max_length: tokens of the longest sequence.
        digest: blake3 of the token ids, the units and the batches; another one is another extraction.
    """

    layout: Layout
    seed: int
    batch_size: int
    batch_tokens: int | None
    uncounted_ids: tuple[int, ...]
    shuffled: bool
    units: tuple[Unit, ...]
    counted: np.ndarray
    tokens: int
    max_length: int
    digest: str


def make_plan(
    sequences: Sequences,
    *,
    layout: Layout,
    seed: int,
    batch_size: int,
    batch_tokens: int | None = None,
    row_bytes: int,
    uncounted_ids: Sequence[int] = (),
    shuffled: bool = True,
    unit_bytes: int = UNIT_BYTES,
    unit_share: float = UNIT_SHARE,
    most_unit_bytes: int = MOST_UNIT_BYTES,
) -> Plan:
    """Cut sequences into units of at most `unit_bytes`, 1M rows and 5 % of the job, but at least 64 sequences.

    The least number of sequences gives way where it would make a unit of more than 1 GiB: a unit is held in memory.
    Layout `rows` permutes the sequences by the seed first, so that neighbours in the dataset come apart, and cuts
    between batches; layout `sequences` keeps their order. A batch holds sequences of similar length.

    Args:
        sequences: what is extracted.
        layout: `rows` or `sequences`.
        seed: of the permutations.
        batch_size: most sequences per forward pass.
        batch_tokens: most tokens per forward pass, padding included, of more than one sequence.
        row_bytes: bytes of all hook points' vectors of one token.
        uncounted_ids: token ids that are no rows.
        shuffled: whether the rows of a unit will be in random order, in layout `rows`.
        unit_bytes: most bytes of a unit.
        unit_share: most of the job's rows in a unit, 0 to 1.
        most_unit_bytes: bytes of a unit beyond which the least number of sequences gives way.

    Raises:
        NothingCounted: no token would be a row.
    """
    counted = sequences.counted(uncounted_ids)
    if not counted.any():
        raise NothingCounted("every token of the dataset is a special token")
    rows = sequences.totals(counted)
    cuts = _cut_rows if layout == "rows" else _cut_sequences
    limits = _Limits(min(unit_bytes // row_bytes, UNIT_ROWS), most_unit_bytes // row_bytes, unit_share)
    parts = cuts(sequences.lengths, rows, seed, (batch_size, batch_tokens), limits)
    made_with: dict[str, Any] = {"layout": layout, "seed": seed, "batch_size": batch_size, "batch_tokens": batch_tokens}
    made_with |= {"uncounted_ids": tuple(uncounted_ids), "shuffled": shuffled}
    return _plan(sequences, counted, rows, parts, made_with)


def plan_arrays(plan: Plan) -> dict[str, np.ndarray]:
    """What has to be kept of a plan, int32: per unit its `batches`, per batch its `sizes` and `lengths`, `indices`."""
    batches = [batch for unit in plan.units for batch in unit.batches]
    return {
        "batches": np.asarray([len(unit.batches) for unit in plan.units], dtype=np.int32),
        "sizes": np.asarray([len(batch.indices) for batch in batches], dtype=np.int32),
        "lengths": np.asarray([batch.length for batch in batches], dtype=np.int32),
        "indices": np.concatenate([batch.indices for batch in batches]).astype(np.int32),
    }


def plan_again(arrays: Mapping[str, np.ndarray], sequences: Sequences, digest: str, **made_with: Any) -> Plan | None:
    """The plan of this digest from its arrays; None where the arrays or the sequences are not that plan's.

    Args:
        arrays: what `plan_arrays` gave, maybe damaged.
        sequences: what the plan was made of.
        digest: of the plan.
        made_with: layout, seed, batch_size, batch_tokens, uncounted_ids and shuffled, as for `make_plan`.
    """
    if not _fitting(arrays, len(sequences)):
        return None
    members = np.split(arrays["indices"].astype(np.int64), np.cumsum(arrays["sizes"])[:-1])
    batches = [Batch(indices, int(length)) for indices, length in zip(members, arrays["lengths"], strict=True)]
    ends = np.cumsum(arrays["batches"])
    parts = [batches[end - count : end] for end, count in zip(ends, arrays["batches"], strict=True)]
    counted = sequences.counted(made_with["uncounted_ids"])
    found = _plan(sequences, counted, sequences.totals(counted), parts, made_with)
    return found if found.digest == digest else None


def _fitting(arrays: Mapping[str, np.ndarray], sequences: int) -> bool:
    """Whether the arrays are some plan's over so many sequences."""
    if arrays.keys() != {"batches", "sizes", "lengths", "indices"}:
        return False
    batches, sizes, lengths, indices = (arrays[name] for name in ("batches", "sizes", "lengths", "indices"))
    if any(array.ndim != 1 or array.dtype != np.int32 or not len(array) for array in arrays.values()):
        return False
    whole = len(sizes) == len(lengths) == batches.sum() and len(indices) == sizes.sum()
    inside = indices.min() >= 0 and indices.max() < sequences
    return bool(whole and inside and batches.min() > 0 and sizes.min() > 0)


def _plan(
    sequences: Sequences,
    counted: np.ndarray,
    rows: np.ndarray,
    parts: Sequence[list[Batch]],
    made_with: dict[str, Any],
) -> Plan:
    """A unit of each list of batches, with `rows` int64 [n] of each sequence."""
    units: list[Unit] = []
    first_batch = 0
    for batches in parts:
        chosen = np.sort(np.concatenate([batch.indices for batch in batches]))
        units.append(Unit(len(units), chosen, tuple(batches), first_batch, int(rows[chosen].sum())))
        first_batch += len(batches)
    return Plan(
        **made_with,
        units=tuple(units),
        counted=counted,
        tokens=int(counted.sum()),
        max_length=int(sequences.lengths.max()),
        digest=_digest(sequences, units, made_with),
    )


_Most = tuple[int, int | None]
"""Most sequences and most tokens of a batch."""


class _Limits(NamedTuple):
    """Rows that a unit may have, rows that it may have even for the sake of enough sequences, and its share of all."""

    rows: int
    most_rows: int
    share: float


def _cut_rows(lengths: np.ndarray, rows: np.ndarray, seed: int, most: _Most, limits: _Limits) -> list[list[Batch]]:
    """Permute the sequences, batch them by length within windows, permute each window's batches, cut them into units.

    Sorting a whole window costs next to no padding, and a unit still gets batches of all lengths.
    """
    order = permutation(len(rows), seed, "sequences")
    order = order[rows[order] > 0]
    batches: list[Batch] = []
    for number, low in enumerate(range(0, len(order), WINDOW)):
        window = plan_batches(lengths, most[0], order[low : low + WINDOW], most[1])
        batches += [window[place] for place in permutation(len(window), seed, "batches", number)]
    sizes = [(len(batch.indices), int(rows[batch.indices].sum())) for batch in batches]
    return [batches[part] for part in _cut(sizes, limits)]


def _cut_sequences(lengths: np.ndarray, rows: np.ndarray, seed: int, most: _Most, limits: _Limits) -> list[list[Batch]]:
    """Cut the sequences as they are; every one takes the room of the longest. Batches go by length within a unit."""
    order, longest = np.arange(len(rows)), int(lengths.max())
    return [plan_batches(lengths, most[0], order[part], most[1]) for part in _cut([(1, longest)] * len(rows), limits)]


def _cut(sizes: Sequence[tuple[int, int]], limits: _Limits) -> list[slice]:
    """Runs of items (sequences, rows), each as long as a unit may be."""
    limit = min(limits.rows, int(sum(rows for _, rows in sizes) * limits.share))
    parts, start, sequences, rows = [], 0, 0, 0
    for place, (more_sequences, more_rows) in enumerate(sizes):
        enough = sequences >= UNIT_SEQUENCES and rows + more_rows > limit
        if place > start and (enough or rows + more_rows > limits.most_rows):
            parts.append(slice(start, place))
            start, sequences, rows = place, 0, 0
        sequences += more_sequences
        rows += more_rows
    return [*parts, slice(start, len(sizes))]


def _digest(sequences: Sequences, units: Sequence[Unit], made_with: Mapping[str, Any]) -> str:
    decided = tuple(made_with[name] for name in ("layout", "seed", "uncounted_ids", "shuffled"))
    digest = blake3(repr(decided).encode())
    for array in (sequences.ids, sequences.offsets, sequences.rows):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    for unit in units:
        for batch in unit.batches:
            digest.update(np.asarray([unit.index, batch.length, *batch.indices], dtype="<i8").tobytes())
    return digest.hexdigest()
