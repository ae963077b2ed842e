"""The files of an activation cache: what is in them, and how they are read.

A cache is one directory; nothing in it depends on when or where it was made, so that the same extraction gives the
same bytes.

manifest.json            `Manifest` as JSON
statistics.safetensors   per hook point, over all counted tokens: `<hook point>.mean` and `<hook point>.second_moment`
                         (mean of x * x per dimension), F64 [d]
sequences.safetensors    where the rows come from, n sequences of the dataset in its order:
                         `offset` I64 [n + 1] into `ids`; `ids` I32 [tokens] token ids, special ones included;
                         `batch` I32 [n] number of the forward batch it went through (the sequences of a number,
                         longest first, then by index, padded on the right, are that batch; -1: in none).
                         Sequences are made of m pieces of dataset rows, of one each without packing: `row` I64 [m]
                         dataset row; `start` I64 [m] where the piece begins in `ids`; `first` I64 [m] number of its
                         first token within the row. `span` I32 [tokens, 2], where the tokenizer tells: first character
                         of each token in its row's text and the one behind its last, -1 for special tokens.
shard-00000.safetensors  activations. Layout `rows`, one row per counted token: `<hook point>` [rows, d];
                         `tok`, `seq`, `pos` I32 [rows]: token id, index into sequences.safetensors, position there.
                         Layout `sequences`, dataset order, S the cache's longest sequence, padded on the right with
                         zeros: `<hook point>` [n, S, d]; `tok` I32 [n, S]; `mask` U8 [n, S], 1 where a token counts;
                         `seq` I32 [n]

Counted tokens are those that are neither padding nor in `Manifest.uncounted_ids` (the tokenizer's special tokens).
Any safetensors reader opens the files; `ShardReader` also checks them against the manifest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.residency.shuffle import draw, permutation

Layout = Literal["rows", "sequences"]
Problem = Literal["missing", "truncated", "corrupt"]

FORMAT = "lensmesh.activations/1"
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
SEQUENCES = "sequences.safetensors"
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MIXED_SHARDS = 8
"""Shards that a row iterator draws from at once."""


class CorruptCache(ValueError):
    """A file of the cache is not what the manifest says. `file` is its name, `problem` what is wrong."""

    def __init__(self, file: str, problem: Problem) -> None:
        super().__init__(f"{file} is {problem}")
        self.file = file
        self.problem = problem


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: name, bytes, blake3 of its content (hexadecimal)."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class ShardEntry(FileEntry):
    """A shard; `rows` counts its counted tokens, `sequences` the sequences they come from."""

    rows: int
    sequences: int


@dataclass(frozen=True, slots=True)
class HookPointEntry:
    """A hook point: its name is its tensor's. `variance` is the sum over dimensions, `mean_norm` of Euclidean norms.

    `q`, `k`, `v`, `z` are [heads, d_head] flattened; a `pattern` is [heads, the cache's longest sequence] flattened,
    each query's weights of the keys, 0 on padding.
    """

    name: str
    site: str
    layer: int | str
    width: int
    mean_norm: float
    variance: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cache holds.

    Attributes:
        hook_points: in the order they were asked for.
        layout: `rows` or `sequences`.
        dtype: of the activations: `float32`, `bfloat16` or `float16`.
        shuffled: whether the rows of a shard are in random order; never in layout `sequences`.
        tokens: counted tokens, over all shards.
        samples: sequences.
        max_length: tokens of the longest sequence.
        uncounted_ids: token ids that are in no row and in no statistic.
        shards: in order.
        sequences, statistics: those two files.
        model: `id, digest, revision, quantization, dtype, family, attention` of the model that ran.
        extension: `id, digest` of the extension that was active, or None.
        dataset: `id, digest, source, identifier, split, text_field, rows_read, bad_rows, truncated_rows,
            truncated_tokens, max_length, special_tokens, packing`.
        tokenizer: `digest`, or None for a dataset that came tokenised.
        plan: `seed, batch_size, unit_rows, digest`: what fixed the order and the batches.
        identity_errors: largest relative error of the identity check, per layer of an MLP pair.
    """

    hook_points: tuple[HookPointEntry, ...]
    layout: Layout
    dtype: str
    shuffled: bool
    tokens: int
    samples: int
    max_length: int
    uncounted_ids: tuple[int, ...]
    shards: tuple[ShardEntry, ...]
    sequences: FileEntry
    statistics: FileEntry
    model: dict[str, Any]
    dataset: dict[str, Any]
    plan: dict[str, Any]
    extension: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    identity_errors: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hook points."""
        return tuple(point.name for point in self.hook_points)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size_bytes for entry in (*self.shards, self.sequences, self.statistics))

    def width(self, name: str) -> int:
        """Width of a hook point.

        Raises:
            KeyError: the cache does not hold it.
        """
        return {point.name: point.width for point in self.hook_points}[name]

    def to_json(self) -> str:
        """The manifest as JSON; the same manifest gives the same text."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse `to_json`'s text.

        Raises:
            ValueError: it is no manifest of this format.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """What `to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: it is no manifest of this format.
        """
        try:
            raw = dict(values)
            if raw.pop("format") != FORMAT:
                raise ValueError("unknown format")
            raw["hook_points"] = tuple(HookPointEntry(**point) for point in raw["hook_points"])
            raw["shards"] = tuple(ShardEntry(**shard) for shard in raw["shards"])
            raw["sequences"] = FileEntry(**raw["sequences"])
            raw["statistics"] = FileEntry(**raw["statistics"])
            raw["uncounted_ids"] = tuple(raw["uncounted_ids"])
            return cls(**raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("the manifest of the cache is not valid") from error


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def file_digest(path: Path) -> str:
    """blake3 of a file's content, hexadecimal."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def problem_of(directory: Path, entry: FileEntry) -> Problem | None:
    """What is wrong with a file, None when its bytes are what the manifest says."""
    path = directory / entry.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size != entry.size_bytes:
        return "truncated" if size < entry.size_bytes else "corrupt"
    return None if file_digest(path) == entry.digest else "corrupt"


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows by hook point, [B, d] in the cache's dtype, and the cursor from which the next batch starts."""

    rows: dict[str, Tensor]
    cursor: int


class _ShardRows:
    """One shard's rows in one order: from `first` on and around, or by `order`."""

    def __init__(self, tensors: dict[str, Tensor], count: int, *, first: int = 0, order: Tensor | None = None) -> None:
        self.count = count
        self._tensors = tensors
        self._first = first
        self._order = order

    def take(self, low: int, high: int) -> list[dict[str, Tensor]]:
        """The rows [low, high) of the order, in one or two parts."""
        if self._order is not None:
            chosen = self._order[low:high]
            return [{name: tensor[chosen] for name, tensor in self._tensors.items()}]
        low, high = self._first + low, self._first + high
        if low < self.count < high:
            return self._slice(low, self.count) + self._slice(0, high - self.count)
        return self._slice(low % self.count, low % self.count + high - low)

    def _slice(self, low: int, high: int) -> list[dict[str, Tensor]]:
        return [{name: tensor[low:high] for name, tensor in self._tensors.items()}]


class _Mix:
    """The rows of some shards in one random order, of which `start` are passed over."""

    def __init__(self, sources: list[_ShardRows], seed: tuple[int, ...], start: int) -> None:
        self._sources = sources
        labels = np.repeat(np.arange(len(sources), dtype=np.uint8), [source.count for source in sources])
        self._labels = labels[permutation(len(labels), "mix", *seed)]
        self._position = start
        self._taken = np.bincount(self._labels[:start], minlength=len(sources))

    def take(self, count: int) -> dict[str, Tensor] | None:
        """The next rows, at most `count`; None at the end."""
        labels = self._labels[self._position : self._position + count]
        if not len(labels):
            return None
        until = self._taken + np.bincount(labels, minlength=len(self._sources))
        parts = [
            part
            for source, low, high in zip(self._sources, self._taken.tolist(), until.tolist(), strict=True)
            if high > low
            for part in source.take(low, high)
        ]
        self._position += len(labels)
        self._taken = until
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ShardReader:
    """Reads a cache in place: tensors are views of mapped files, each verified against its digest at first use.

    A reader of a cache that could be evicted holds a lease on it for as long as it reads.

    Raises:
        CorruptCache: the manifest is missing or not valid.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._verified: set[str] = set()
        try:
            self.manifest = Manifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CorruptCache(MANIFEST, "missing") from error
        except ValueError as error:
            raise CorruptCache(MANIFEST, "corrupt") from error

    def shard(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors of a shard by name, all of them when `names` is None.

        Raises:
            CorruptCache: the file is missing or its bytes are others than were written.
            KeyError: the shard holds no tensor of such a name.
        """
        return self._read(self.manifest.shards[index], names)

    def sequences(self) -> dict[str, Tensor]:
        """`row`, `offset`, `ids`, `batch`, as the module says.

        Raises:
            CorruptCache: the file is missing or its bytes are others than were written.
        """
        return self._read(self.manifest.sequences, None)

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """(mean, second moment) of a hook point per dimension, float64 [d].

        Raises:
            CorruptCache: the file is missing or its bytes are others than were written.
            KeyError: the cache does not hold this hook point.
        """
        found = self._read(self.manifest.statistics, (f"{name}.mean", f"{name}.second_moment"))
        return found[f"{name}.mean"], found[f"{name}.second_moment"]

    def dtypes(self, names: Sequence[str]) -> set[str]:
        """Number formats of hook points over all shards, as safetensors calls them; reads the files' headers only.

        Raises:
            CorruptCache: a shard is missing or its header cannot be read.
            KeyError: a shard holds no tensor of such a name.
        """
        found: set[str] = set()
        for entry in self.manifest.shards:
            try:
                with safe_open(self._directory / entry.name, framework="pt") as file:
                    for name in _known(file, names):
                        found.add(file.get_slice(name).get_dtype())
            except FileNotFoundError as error:
                raise CorruptCache(entry.name, "missing") from error
            except SafetensorError as error:
                raise CorruptCache(entry.name, "corrupt") from error
        return found

    def verify(self) -> list[tuple[FileEntry, Problem]]:
        """Every file that is not what the manifest says; empty when all is well. Reads every byte."""
        files = (*self.manifest.shards, self.manifest.sequences, self.manifest.statistics)
        return [(entry, problem) for entry in files if (problem := problem_of(self._directory, entry))]

    def iter_rows(self, names: Sequence[str], batch_size: int, seed: int = 0, start: int = 0) -> Iterator[RowBatch]:
        """Counted rows in random order, pass after pass without end; every pass gives every row once.

        A batch mixes the rows of up to `MIXED_SHARDS` shards. The same seed gives the same rows after the same cursor,
        so that a run goes on from `RowBatch.cursor`; with another batch size too.

        Args:
            names: hook points to read.
            batch_size: rows of every batch.
            seed: of the order.
            start: rows to pass over.

        Raises:
            CorruptCache: a shard is missing or its bytes are others than were written.
            KeyError: the cache does not hold a hook point.
        """
        for name in names:
            self.manifest.width(name)
        parts: list[dict[str, Tensor]] = []
        missing, cursor = batch_size, start
        for mix in self._mixes(names, seed, start):
            while rows := mix.take(missing):
                taken = len(rows[names[0]])
                parts.append(rows)
                missing, cursor = missing - taken, cursor + taken
                if missing == 0:
                    yield RowBatch({name: torch.cat([part[name] for part in parts]) for name in names}, cursor)
                    parts, missing = [], batch_size

    def drawn_from(self, seed: int, start: int) -> list[int]:
        """Numbers of the shards that `iter_rows` draws the row after the cursor `start` from."""
        return next(self._draws(seed, start))[1]

    def _mixes(self, names: Sequence[str], seed: int, start: int) -> Iterator[_Mix]:
        for number, chosen, skip in self._draws(seed, start):
            sources = [self._rows(index, names, seed, number) for index in chosen]
            yield _Mix(sources, (seed, number, chosen[0]), skip)

    def _draws(self, seed: int, start: int) -> Iterator[tuple[int, list[int], int]]:
        """Number of the pass, shards that are mixed, and how many of their rows are passed over."""
        shards = self.manifest.shards
        first_pass, skip = divmod(start, self.manifest.tokens)
        for number in itertools.count(first_pass):
            order = permutation(len(shards), seed, number).tolist()
            for chosen in (order[low : low + MIXED_SHARDS] for low in range(0, len(order), MIXED_SHARDS)):
                rows = sum(shards[index].rows for index in chosen)
                if skip < rows:
                    yield number, chosen, skip
                skip = max(0, skip - rows)

    def _rows(self, index: int, names: Sequence[str], seed: int, number: int) -> _ShardRows:
        """A shard's counted rows in the order of pass `number`; rows that lie shuffled are read in long runs."""
        if self.manifest.shuffled:
            count = self.manifest.shards[index].rows
            return _ShardRows(self.shard(index, names), count, first=draw(count, seed, number, index))
        found = self.shard(index, [*names, *(["mask"] if self.manifest.layout == "sequences" else [])])
        tensors = {name: found[name].flatten(0, -2) for name in names}
        counted = torch.arange(self.manifest.shards[index].rows)
        if "mask" in found:
            counted = found["mask"].flatten().nonzero().flatten()
        order = torch.from_numpy(permutation(len(counted), seed, number, index))
        return _ShardRows(tensors, len(counted), order=counted[order])

    def _read(self, entry: FileEntry, names: Sequence[str] | None) -> dict[str, Tensor]:
        if entry.name not in self._verified:
            problem = problem_of(self._directory, entry)
            if problem is not None:
                raise CorruptCache(entry.name, problem)
            self._verified.add(entry.name)
        with safe_open(self._directory / entry.name, framework="pt") as file:
            return {name: file.get_tensor(name) for name in _known(file, names)}


def _known(file: Any, names: Sequence[str] | None) -> Sequence[str]:
    known = set(file.keys())
    for name in names or ():
        if name not in known:
            raise KeyError(name)
    return names or sorted(known)
