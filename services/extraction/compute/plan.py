"""How a dataset is cut into units and batches: the same on every machine, so that work can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        layout, seed, batch_size, uncounted_ids: what it was made with.
        units: in order.
        counted: whether each of the sequences' tokens is a row, bool [tokens].
        tokens: counted tokens.
        max_length: tokens of the longest sequence.
        digest: blake3 of the token ids, the units and the batches; another one is another extraction.
    """

    layout: Layout
    seed: int
    batch_size: int
    uncounted_ids: tuple[int, ...]
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
    row_bytes: int,
    uncounted_ids: Sequence[int] = (),
    unit_bytes: int = UNIT_BYTES,
) -> Plan:
    """Cut sequences into units of at most `unit_bytes`, 1M rows and 5 % of the job, but at least 64 sequences.

    The least number of sequences gives way where it would make a unit of more than 1 GiB: a unit is held in memory.
    Layout `rows` permutes the sequences by the seed first, so that neighbours in the dataset come apart; layout
    `sequences` keeps their order. Within a unit batches go by length.

    Args:
        sequences: what is extracted.
        layout: `rows` or `sequences`.
        seed: of the permutations.
        batch_size: sequences per forward pass.
        row_bytes: bytes of all hook points' vectors of one token.
        uncounted_ids: token ids that are no rows.
        unit_bytes: most bytes of a unit.

    Raises:
        NothingCounted: no token would be a row.
    """
    counted = ~np.isin(sequences.ids, np.asarray(uncounted_ids, dtype=np.int32))
    if not counted.any():
        raise NothingCounted("every token of the dataset is a special token")
    rows = np.add.reduceat(counted, sequences.offsets[:-1], dtype=np.int64)
    longest = int(sequences.lengths.max())
    weights = rows if layout == "rows" else np.full(len(rows), longest)
    order = np.arange(len(rows))
    if layout == "rows":
        order = permutation(len(rows), seed, "sequences")
        order = order[rows[order] > 0]
    most_rows = min(unit_bytes // row_bytes, UNIT_ROWS, int(weights.sum() * UNIT_SHARE))
    units: list[Unit] = []
    first_batch = 0
    for chosen in _cut(order, weights, most_rows, MOST_UNIT_BYTES // row_bytes):
        batches = tuple(plan_batches(sequences.lengths, batch_size, chosen))
        units.append(Unit(len(units), np.sort(chosen), batches, first_batch, int(rows[chosen].sum())))
        first_batch += len(batches)
    return Plan(
        layout=layout,
        seed=seed,
        batch_size=batch_size,
        uncounted_ids=tuple(uncounted_ids),
        units=tuple(units),
        counted=counted,
        tokens=int(counted.sum()),
        max_length=longest,
        digest=_digest(sequences, units, layout, seed, uncounted_ids),
    )


def _cut(order: np.ndarray, weights: np.ndarray, most: int, hard_most: int) -> list[np.ndarray]:
    cuts, start, weight = [0], 0, 0
    for place, value in enumerate(weights[order].tolist()):
        enough = place - start >= UNIT_SEQUENCES
        if place > start and ((enough and weight + value > most) or weight + value > hard_most):
            cuts.append(place)
            start, weight = place, 0
        weight += value
    return np.split(order, cuts[1:])


def _digest(
    sequences: Sequences, units: Sequence[Unit], layout: Layout, seed: int, uncounted_ids: Sequence[int]
) -> str:
    digest = blake3(repr((layout, seed, tuple(uncounted_ids))).encode())
    for array in (sequences.ids, sequences.offsets, sequences.rows):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    for unit in units:
        for batch in unit.batches:
            digest.update(np.asarray([unit.index, batch.length, *batch.indices], dtype="<i8").tobytes())
    return digest.hexdigest()
