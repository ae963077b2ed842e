"""Where rows come from and in which order: seed and position decide alone, so that a step count is a data cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from services.training.compute.config import ConfigError

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By pair's name: inputs [N, d_in] and targets [N, d_out] of the same rows; row i of all pairs is the same token's."""


class Source(Protocol):
    """Paired activations of one or more places in a model."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """(d_in, d_out) of every pair."""
        ...

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Batches of `batch_size` rows as stored, without end: pass after pass, each in another order.

        The same seed gives the same rows after the same `start`, the number of rows that are passed over.
        """
        ...


class InMemory:
    """Tensors that are there already."""

    def __init__(self, pairs: Pairs) -> None:
        """Take x [N, d_in] and y [N, d_out] of every pair.

        Raises:
            ConfigError: shapes or dtypes do not fit.
        """
        for x, y in pairs.values():
            _check_pair(x, y)
        if len({len(x) for x, _ in pairs.values()}) != 1:
            raise ConfigError("x", "every pair needs the same number of rows")
        self._pairs = pairs

    @property
    def rows(self) -> int:
        """Rows of every tensor."""
        return len(next(iter(self._pairs.values()))[0])

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Widths by pair."""
        return {name: (x.shape[1], y.shape[1]) for name, (x, y) in self._pairs.items()}

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Rows in a random order of each pass."""
        for index in shuffled(self.rows, batch_size, seed, start):
            yield {name: (x[index], y[index]) for name, (x, y) in self._pairs.items()}


class Stream:
    """Activations as a model gives them, mixed in a buffer that is never more than half empty; nothing is stored."""

    def __init__(self, chunks: Callable[[], Iterable[Pairs]], rows: int, buffer_rows: int = 65_536) -> None:
        """Take the model's output.

        Args:
            chunks: starts the stream again: the same chunks of rows in the same order each time, of any sizes.
            rows: how many there are at least; more are not read in a pass.
            buffer_rows: rows that are held and mixed.

        Raises:
            ConfigError: the first chunk's shapes or dtypes do not fit, or there is none.
        """
        first = next(iter(chunks()), None)
        if first is None:
            raise ConfigError("chunks", "the stream is empty")
        self._widths = InMemory(first).widths
        self._chunks, self._rows, self._held = chunks, rows, min(buffer_rows, rows)

    @property
    def rows(self) -> int:
        """Rows of a pass."""
        return self._rows

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Widths by pair."""
        return self._widths

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """Rows drawn from the buffer; to start late, everything before is read again.

        Raises:
            ConfigError: the stream ends before its number of rows.
        """
        return evenly(self._mixed(seed, start), batch_size)

    def _mixed(self, seed: int, skip: int) -> Iterator[Pairs]:
        """Pieces of the buffer, in random order: when it is full one half of it leaves; at a pass's end, all of it."""
        number, skip = divmod(skip, self._rows)
        while True:
            draw = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            held: list[Pairs] = []
            for last, chunk in self._counted():
                held.append(chunk)
                rows = sum(len(_some(one)) for one in held)
                if rows < self._held and not last:
                    continue
                whole, order = _joined(held), torch.randperm(rows, generator=draw)
                leaving = rows if last else rows // 2
                held = [_cut(whole, order[leaving:])]
                if skip < leaving:
                    yield _cut(whole, order[skip:leaving])
                skip = max(0, skip - leaving)
            number += 1

    def _counted(self) -> Iterator[tuple[bool, Pairs]]:
        """One pass of exactly `rows`, and which chunk is its last."""
        left = self._rows
        for chunk in self._chunks():
            found = _cut(chunk, slice(0, left))
            left -= len(_some(found))
            yield left == 0, found
            if left == 0:
                return
        raise ConfigError("rows", f"the stream ended {left} rows early")


def evenly(pieces: Iterator[Pairs], batch_size: int) -> Iterator[Pairs]:
    """The same rows in batches of `batch_size`; what is left over at the end is not handed out."""
    parts: list[Pairs] = []
    missing = batch_size
    for found in pieces:
        taken = 0
        while taken < len(_some(found)):
            parts.append(_cut(found, slice(taken, taken + missing)))
            rows = len(_some(parts[-1]))
            taken, missing = taken + rows, missing - rows
            if not missing:
                yield _joined(parts)
                parts, missing = [], batch_size


def ahead(batches: Iterator[Pairs]) -> Iterator[Pairs]:
    """The same batches; while one is used the next one is made, in a thread."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches)
        while True:
            found = coming.result()
            coming = thread.submit(next, batches)
            yield found


def shuffled(rows: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Row numbers of batch after batch, int64 [batch_size]: whole passes, every pass in another order."""
    number, position = divmod(start, rows)
    order = _order_of(rows, seed, number)
    while True:
        parts, missing = [], batch_size
        while missing:
            part = order[position : position + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
            if position == rows:
                number, position = number + 1, 0
                order = _order_of(rows, seed, number)
        yield torch.cat(parts)


def _order_of(rows: int, seed: int, number: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63))


def _some(pairs: Pairs) -> Tensor:
    return next(iter(pairs.values()))[0]


def _cut(pairs: Pairs, part: slice | Tensor) -> Pairs:
    return {name: (x[part], y[part]) for name, (x, y) in pairs.items()}


def _joined(parts: list[Pairs]) -> Pairs:
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in parts[0]
    }


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if tensor.ndim != 2 or not tensor.shape[1]:
            raise ConfigError(name, f"shape {list(tensor.shape)}, expected [rows, width]")
        if not tensor.is_floating_point():
            raise ConfigError(name, f"{tensor.dtype}, expected a floating-point tensor")
    if len(x) != len(y):
        raise ConfigError("y", f"{len(y)} rows for the {len(x)} of x")
    if x.dtype != y.dtype:
        raise ConfigError("y", f"{y.dtype}, but x is {x.dtype}")
