"""Token sequences of equal length with their labels, and the order in which training sees them.

Shapes: N examples, S positions, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What a model is trained or judged on. Padding is on the right, where causal attention cannot see it."""

    ids: torch.Tensor
    """Token ids [N, S], int64: whole rows for a causal model, prompts for an encoder."""
    labels: torch.Tensor
    """int64, not shifted, `IGNORED` where the loss does not look. Causal: [N, S], the ids again, less padding and
    prompts. Encoder-decoder: [N, T], the targets."""
    mask: torch.Tensor | None = None
    """[N, S], 1 where an encoder may look; None where there is no encoder."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def digest(self) -> str:
        """Content digest of ids and labels."""
        content = blake3()
        for tensor in (self.ids, self.labels):
            content.update(str(list(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

    def take(self, rows: torch.Tensor | slice) -> Examples:
        """Some of the examples."""
        return Examples(self.ids[rows], self.labels[rows], None if self.mask is None else self.mask[rows])

    def save(self, path: Path) -> None:
        """Into a safetensors file."""
        tensors = {"ids": self.ids, "labels": self.labels} | ({} if self.mask is None else {"mask": self.mask})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save` wrote."""
        return cls(**load_file(path))

    def batches(self, size: int) -> Iterable[Examples]:
        """All examples in order, `size` at a time."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))


def from_texts(sequences: Iterable[Sequence[int]], length: int, separator: int) -> Examples:
    """Concatenate token sequences, a separator after each, and cut the stream into rows of `length`.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    stream: list[int] = []
    for sequence in sequences:
        stream.extend(sequence)
        stream.append(separator)
    if len(stream) <= 2:
        raise ValueError("the dataset holds no text")
    rows = [stream[start : start + length] for start in range(0, len(stream), length)]
    if len(rows) > 1 and len(rows[-1]) < 2:
        rows.pop()
    return _padded([(row, row) for row in rows], separator)


def from_pairs(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], length: int, separator: int) -> Examples:
    """One row per (prompt, target), loss on the target and the separator after it; prompts lose their beginning first.

    Raises:
        ValueError: there is no pair, or a target is empty or leaves no room for a token of its prompt.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for number, (prompt, target) in enumerate(pairs):
        answer = [*target, separator]
        room = length - len(answer)
        if not target or room < 1:
            raise ValueError(f"row {number} has a target of {len(target)} tokens; 1 to {length - 2} fit")
        asked = list(prompt[-room:]) or [separator]
        rows.append(([*asked, *answer], [IGNORED] * len(asked) + answer))
    if not rows:
        raise ValueError("the dataset holds no rows")
    return _padded(rows, separator)


def from_prompts(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], length: int, end: int, pad: int) -> Examples:
    """One row per (prompt, target) for an encoder-decoder: both end in `end`, prompts lose their beginning first.

    Raises:
        ValueError: there is no pair, or a target is empty or longer than `length` with its end.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for number, (prompt, target) in enumerate(pairs):
        if not 0 < len(target) < length:
            raise ValueError(f"row {number} has a target of {len(target)} tokens; 1 to {length - 1} fit")
        asked = [*prompt] if prompt and prompt[-1] == end else [*prompt, end]
        rows.append((asked[-length:], [*target, end]))
    if not rows:
        raise ValueError("the dataset holds no rows")
    ids, labels = _rectangle([ids for ids, _ in rows], pad), _rectangle([labels for _, labels in rows], IGNORED)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    return Examples(ids, labels, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> Examples:
    ids, labels = _rectangle([ids for ids, _ in rows], pad), _rectangle([labels for _, labels in rows], IGNORED)
    return Examples(ids, labels)


def _rectangle(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Rows of unequal length as one int64 tensor, filled up on the right."""
    filled = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = torch.tensor(row)
    return filled


class Order:
    """Which examples batch number b holds: one permutation an epoch, drawn from seed and epoch alone.

    There is no state to save: a resumed training asks for the same batches by number.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._cached: tuple[int, torch.Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def batch(self, number: int) -> torch.Tensor:
        """Rows [B] of batch `number`, which may reach over the end of an epoch."""
        first = number * self._batch_size
        rows = [self._row(position) for position in range(first, first + self._batch_size)]
        return torch.stack(rows)

    def _row(self, position: int) -> torch.Tensor:
        epoch, index = divmod(position, self._count)
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(self._count, generator=generator))
        return self._cached[1][index]
