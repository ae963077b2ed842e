"""Rows of a dataset, as texts, as pairs of prompt and target, or as token sequences in deterministic batches.

    rows = open_rows(record, roots)                          # hub, local file or directory, or the record's own texts
    sequences = tokenize(rows, tokenizer, max_length=256)    # flat token ids; bad rows are counted
    for batch in plan_batches(sequences.lengths, 32):        # length buckets, the same ones every time
        ids, mask = sequences.padded(batch.indices, batch.length)    # int64 [B, S], right-padded; mask 1 on real tokens

Nothing here needs torch: `torch.from_numpy` makes tensors of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from blake3 import blake3

Source = Literal["huggingface", "local", "inline"]

INPUT_IDS = "input_ids"
"""Column of token ids; a dataset that has it, and not its text column, counts as tokenised already."""

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MOST_ID = np.iinfo(np.int32).max
_CHUNK = 1000
"""Rows tokenised at once: enough for the tokenizer's threads, little memory."""


class DatasetError(ValueError):
    """The dataset cannot be read, or holds nothing usable. `field` is the request field to blame; no path is named."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """What the registry knows about a dataset, under the registry's names; `texts` holds an inline dataset's rows."""

    id: str
    source: Source
    identifier: str = ""
    split: str = "train"
    text_field: str = "text"
    prompt_field: str | None = None
    target_field: str | None = None
    texts: tuple[str, ...] = ()
    digest: str | None = None


class Table(Protocol):
    """What is needed of a `datasets.Dataset`."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice) -> Mapping[str, list]: ...


class _Inline:
    def __init__(self, record: DatasetRecord) -> None:
        self.column_names = [record.text_field]
        self._texts = record.texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, key: slice) -> Mapping[str, list]:
        return {self.column_names[0]: list(self._texts[key])}


class Rows:
    """The rows of an opened dataset; `len()` counts all of them, usable or not."""

    def __init__(self, record: DatasetRecord, table: Table) -> None:
        self.record = record
        self._table = table
        columns = set(table.column_names)
        self.paired = bool(record.prompt_field and record.target_field)
        self.tokenized = not self.paired and record.text_field not in columns and INPUT_IDS in columns
        wanted = (record.prompt_field, record.target_field) if self.paired else (record.text_field,)
        for name in () if self.tokenized else wanted:
            if name not in columns:
                known = ", ".join(sorted(columns)[:20])
                raise DatasetError("dataset_id", f"the dataset has no column {name!r}; it has: {known}")

    def __len__(self) -> int:
        return len(self._table)

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[str | None]:
        """Text of each row, None where it has none; of a pair, prompt and target in one."""
        if self.paired:
            for pair in self.pairs(start, stop):
                yield "".join(pair) if pair else None
            return
        for value in self._column(self.record.text_field, start, stop):
            yield value if isinstance(value, str) and value else None

    def pairs(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, str] | None]:
        """(prompt, target) of each row, None where one of them is missing.

        Raises:
            DatasetError: the record names no prompt and target columns.
        """
        if not self.paired:
            raise DatasetError("dataset_id", "the dataset names no prompt_field and target_field")
        prompts = self._column(str(self.record.prompt_field), start, stop)
        targets = self._column(str(self.record.target_field), start, stop)
        for prompt, target in zip(prompts, targets, strict=True):
            usable = isinstance(prompt, str) and isinstance(target, str) and prompt and target
            yield (prompt, target) if usable else None

    def token_ids(self, start: int = 0, stop: int | None = None) -> Iterator[Sequence[int] | None]:
        """Token ids of each row of a tokenised dataset, None where they are no list of integers."""
        for value in self._column(INPUT_IDS, start, stop):
            usable = isinstance(value, list) and value and all(type(token) is int for token in value)
            yield value if usable else None

    def _column(self, name: str, start: int, stop: int | None) -> Iterator[Any]:
        end = len(self) if stop is None else min(stop, len(self))
        for low in range(start, end, _CHUNK):
            yield from self._table[low : min(low + _CHUNK, end)][name]


def open_rows(record: DatasetRecord, roots: Sequence[Path] = (), cache_dir: Path | None = None) -> Rows:
    """Open a dataset.

    Args:
        record: which one.
        roots: directories below which a local identifier may lie, looked up in order.
        cache_dir: where `datasets` keeps what it downloads and converts; its own default when None.

    Raises:
        DatasetError: it does not exist, lies outside the roots, cannot be parsed, or lacks its columns or rows.
    """
    rows = Rows(record, _Inline(record) if record.source == "inline" else _load(record, roots, cache_dir))
    if not len(rows):
        raise DatasetError("dataset_id", "the dataset has no rows")
    return rows


def content_digest(record: DatasetRecord, roots: Sequence[Path] = ()) -> str:
    """blake3 of a local or inline dataset's content (file names and bytes, or texts), hexadecimal.

    Raises:
        DatasetError: the dataset is not there; or it is on the hub, whose commit only the hub knows.
    """
    if record.source == "huggingface":
        raise DatasetError("dataset_id", "a hub dataset has no local content to digest")
    digest = blake3()
    if record.source == "inline":
        for text in record.texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()
    path = locate(record.identifier, roots)
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(blake3(max_threads=blake3.AUTO).update_mmap(file).digest())
    return digest.hexdigest()


def locate(identifier: str, roots: Sequence[Path]) -> Path:
    """The file or directory that a local identifier names, symbolic links resolved.

    Raises:
        DatasetError: it is not below any root.
    """
    if not identifier or len(identifier) > 500 or any(character in identifier for character in "\0\\%"):
        raise DatasetError("identifier", "not a path relative to a dataset root")
    for root in roots:
        base = root.resolve()
        path = (base / identifier).resolve()
        if path.is_relative_to(base) and path.exists():
            return path
    raise DatasetError("identifier", "no such file or directory below the dataset roots")


def _load(record: DatasetRecord, roots: Sequence[Path], cache_dir: Path | None) -> Table:
    import datasets  # noqa: PLC0415 - digests are taken where the library is not installed

    datasets.disable_progress_bars()
    path = locate(record.identifier, roots) if record.source == "local" else None
    if path is None and Path(record.identifier).exists():
        # load_dataset would silently prefer the file system to the hub.
        raise DatasetError("identifier", "a hub identifier may not name a local path")
    if path is not None and path.is_file() and path.suffix.lower() not in _READERS:
        raise DatasetError("identifier", f"unknown kind of file; known: {', '.join(_READERS)}")
    if path is not None and path.is_file() and not path.stat().st_size:
        raise DatasetError("dataset_id", "the dataset has no rows")  # `datasets` calls it unreadable
    try:
        return _read(record, path, None if cache_dir is None else str(cache_dir))
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        # Their messages hold paths of this machine.
        raise DatasetError("dataset_id", f"the dataset cannot be read ({type(error).__name__})") from error


def _read(record: DatasetRecord, path: Path | None, cache_dir: str | None) -> Table:
    import datasets  # noqa: PLC0415 - digests are taken where the library is not installed

    if path is None:
        return datasets.load_dataset(record.identifier, split=record.split, cache_dir=cache_dir)
    if path.is_file():
        reader = _READERS[path.suffix.lower()]
        return datasets.load_dataset(reader, data_files=str(path), split=record.split, cache_dir=cache_dir)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return saved[record.split] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset(str(path), split=record.split, cache_dir=cache_dir)


SpecialTokens = Literal["tokenizer", "none", "bos"]
"""What is put around a row's tokens: what its tokenizer puts there, nothing, or one BOS before them."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become sequences.

    Attributes:
        max_length: tokens of a sequence at most.
        special_tokens: see `SpecialTokens`; rows that come tokenised are taken as they are.
        packing: join the rows, each ended by the tokenizer's EOS, and cut them every `max_length` tokens, so that no
            token is dropped and a sequence may hold several rows, which see one another. Else a row is a sequence of
            its own, and what is behind `max_length` is dropped.
        spans: record where each token stands in its row's text.
    """

    max_length: int
    special_tokens: SpecialTokens = "tokenizer"
    packing: bool = False
    spans: bool = False


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences in the dataset's order, made of pieces of its rows: without packing, of one each.

    Attributes:
        ids: int32 [tokens], one sequence after the other.
        offsets: int64 [n + 1]; sequence i is ids[offsets[i]:offsets[i + 1]]. None is empty.
        rows: int64 [m], the dataset row of each piece.
        rows_read: dataset rows that were looked at.
        bad_rows: rows without usable text or ids.
        truncated_rows: rows that were longer than max_length.
        truncated_tokens: tokens that were cut off.
        starts: int64 [m], where each piece begins in `ids`, ascending; None: where its sequence does.
        firsts: int64 [m], number of each piece's first token among its row's tokens; None: 0.
        spans: int32 [tokens, 2], first character of each token in its row's text and the one behind its last; -1 for
            tokens that are no text, such as special ones, and for rows that come tokenised. None: not recorded.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    rows_read: int
    bad_rows: int
    truncated_rows: int
    truncated_tokens: int
    starts: np.ndarray | None = None
    firsts: np.ndarray | None = None
    spans: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, start in `ids` and number of the first token within the row, of each piece; int64 [m] each."""
        starts = self.offsets[:-1] if self.starts is None else self.starts
        return self.rows, starts, np.zeros_like(self.rows) if self.firsts is None else self.firsts

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of one sequence, int32."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def padded(self, indices: Sequence[int] | np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask), both int64 [len(indices), length]; padded on the right with id 0 and mask 0."""
        ids = np.zeros((len(indices), length), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            sequence = self.sequence(int(index))
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return ids, mask

    def counted(self, uncounted_ids: Sequence[int]) -> np.ndarray:
        """Whether each token is none of these, bool [tokens]."""
        return ~np.isin(self.ids, np.asarray(uncounted_ids, dtype=np.int32))

    def totals(self, counted: np.ndarray) -> np.ndarray:
        """How many tokens of each sequence are `counted`, bool [tokens]; int64 [n]."""
        return np.add.reduceat(counted, self.offsets[:-1], dtype=np.int64)

    def limited(self, max_tokens: int, uncounted_ids: Sequence[int] = ()) -> Sequences:
        """The beginning that holds `max_tokens` tokens, not counting `uncounted_ids`; it may end within a sequence."""
        counted = np.cumsum(self.counted(uncounted_ids))
        if max_tokens >= counted[-1]:
            return self
        max_tokens = int(np.searchsorted(counted, max_tokens)) + 1
        count = int(np.searchsorted(self.offsets, max_tokens))
        rows, starts, firsts = self.pieces
        pieces = int(np.searchsorted(starts, max_tokens))
        return replace(
            self,
            ids=self.ids[:max_tokens],
            offsets=np.minimum(self.offsets[: count + 1], max_tokens),
            rows=rows[:pieces],
            starts=starts[:pieces],
            firsts=firsts[:pieces],
            spans=None if self.spans is None else self.spans[:max_tokens],
        )


_Row = tuple[np.ndarray, np.ndarray | None]
"""A row's token ids, int32 [n], and their spans, int32 [n, 2]."""


def tokenize(
    rows: Rows,
    tokenizer: Any,
    encoding: Encoding | int,
    row_limit: int | None = None,
    vocab_size: int | None = None,
) -> Sequences:
    """Tokenise the first `row_limit` rows (all when None).

    Args:
        rows: an opened dataset.
        tokenizer: a Hugging Face tokenizer, fast ones run in parallel; unused for a tokenised dataset.
        encoding: how; a number is that max_length and every default.
        row_limit: rows to look at.
        vocab_size: ids at or above it make a row of a tokenised dataset bad.

    Raises:
        DatasetError: row_limit is beyond the dataset (`sample_count`), no row is usable (`dataset_id`), or the
            tokenizer has no BOS to begin with (`special_tokens`).
    """
    if isinstance(encoding, int):
        encoding = Encoding(encoding)
    if row_limit is not None and row_limit > len(rows):
        raise DatasetError("sample_count", f"the dataset has {len(rows)} rows, {row_limit} were asked for")
    stop = len(rows) if row_limit is None else row_limit
    kept: list[_Row] = []
    origin: list[int] = []
    for number, row in enumerate(_encoded(rows, tokenizer, encoding, stop)):
        if row is None or not len(row[0]):
            continue
        if rows.tokenized and vocab_size is not None and row[0].max() >= vocab_size:
            continue
        kept.append(row)
        origin.append(number)
    if not kept:
        raise DatasetError("dataset_id", f"none of the dataset's {stop} rows holds usable text")
    cut = _packed if encoding.packing else _each
    return cut(kept, np.asarray(origin, dtype=np.int64), encoding.max_length, stop)


def _each(kept: list[_Row], origin: np.ndarray, max_length: int, stop: int) -> Sequences:
    """A sequence of each row's beginning."""
    lengths = np.asarray([len(ids) for ids, _ in kept], dtype=np.int64)
    over = np.maximum(lengths - max_length, 0)
    return Sequences(
        ids=np.concatenate([ids[:max_length] for ids, _ in kept]),
        offsets=np.concatenate([[0], np.cumsum(lengths - over)]),
        rows=origin,
        rows_read=stop,
        bad_rows=stop - len(kept),
        truncated_rows=int((over > 0).sum()),
        truncated_tokens=int(over.sum()),
        spans=_joined([spans[:max_length] for _, spans in kept if spans is not None]),
    )


def _packed(kept: list[_Row], origin: np.ndarray, max_length: int, stop: int) -> Sequences:
    """The rows one behind the other, cut every `max_length` tokens; the last sequence may be shorter."""
    row_starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in kept])])
    total = int(row_starts[-1])
    offsets = np.append(np.arange(0, total, max_length), total)
    starts = np.union1d(row_starts[:-1], offsets[:-1])
    row_of = np.searchsorted(row_starts, starts, side="right") - 1
    return Sequences(
        ids=np.concatenate([ids for ids, _ in kept]),
        offsets=offsets,
        rows=origin[row_of],
        rows_read=stop,
        bad_rows=stop - len(kept),
        truncated_rows=0,
        truncated_tokens=0,
        starts=starts,
        firsts=starts - row_starts[row_of],
        spans=_joined([spans for _, spans in kept if spans is not None]),
    )


def _joined(spans: list[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(spans) if spans else None


def _encoded(rows: Rows, tokenizer: Any, encoding: Encoding, stop: int) -> Iterator[_Row | None]:
    if rows.tokenized:
        for ids in rows.token_ids(0, stop):
            usable_ids = ids is not None and 0 <= min(ids) <= max(ids) <= _MOST_ID
            yield _row(ids or (), None, encoding.spans) if usable_ids else None
        return
    before, after = _around(tokenizer, encoding)
    located = encoding.spans and bool(getattr(tokenizer, "is_fast", False))
    own = encoding.special_tokens == "tokenizer"
    for low in range(0, stop, _CHUNK):
        texts = list(rows.texts(low, min(low + _CHUNK, stop)))
        usable = [text for text in texts if text is not None]
        # verbose=False: the tokenizer warns about long texts, which are cut here, where the cut is counted.
        options = {"add_special_tokens": own, "return_offsets_mapping": located, "verbose": False}
        found = tokenizer(usable, **options) if usable else {INPUT_IDS: []}
        places = found["offset_mapping"] if located and usable else [None] * len(usable)
        encoded = zip(found[INPUT_IDS], places, strict=True)
        for text in texts:
            yield None if text is None else _row(*next(encoded), encoding.spans, before, after)


def _around(tokenizer: Any, encoding: Encoding) -> tuple[list[int], list[int]]:
    """Ids that are put before and behind every row's tokens."""
    if encoding.special_tokens == "bos" and tokenizer.bos_token_id is None:
        raise DatasetError("special_tokens", "the model's tokenizer has no BOS token")
    before = [tokenizer.bos_token_id] if encoding.special_tokens == "bos" else []
    ends = encoding.packing and tokenizer.eos_token_id is not None
    return before, [tokenizer.eos_token_id] if ends else []


def _row(
    ids: Sequence[int], places: Any, spans: bool, before: Sequence[int] = (), after: Sequence[int] = ()
) -> _Row | None:
    if not len(ids):
        return None
    behind = [] if list(ids[-1:]) == list(after) else list(after)
    whole = np.asarray([*before, *ids, *behind], dtype=np.int32)
    if not spans:
        return whole, None
    found = np.full((len(whole), 2), -1, dtype=np.int32)
    if places is not None:
        inner = np.asarray(places, dtype=np.int32).reshape(-1, 2)
        inner[inner[:, 0] == inner[:, 1]] = -1
        found[len(before) : len(before) + len(ids)] = inner
    return whole, found


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that go through the model together: `indices` int64 [B], padded to `length` tokens."""

    indices: np.ndarray
    length: int


def plan_batches(
    lengths: np.ndarray, batch_size: int, indices: np.ndarray | None = None, batch_tokens: int | None = None
) -> list[Batch]:
    """Batches of at most `batch_size` sequences of similar length, the longest first.

    The longest first, so that a batch that does not fit the memory fails at once and not at the end. Which of several
    sequences of one length come first is decided by the order of `indices`; within a batch the smaller index comes
    first, so that a batch can be made again from its members alone.

    Args:
        lengths: tokens of every sequence, int [n].
        batch_size: most sequences of a batch, at least 1.
        indices: plan only these sequences; all when None.
        batch_tokens: most tokens of a batch, padding included, that is of more than one sequence.
    """
    chosen = np.arange(len(lengths)) if indices is None else np.asarray(indices, dtype=np.int64)
    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
    cuts, low = [], 0
    while low < len(ordered):
        fitting = batch_size if batch_tokens is None else batch_tokens // int(lengths[ordered[low]])
        cuts.append(ordered[low : low + max(1, min(batch_size, fitting))])
        low += len(cuts[-1])
    return [Batch(cut[np.lexsort((cut, -lengths[cut]))], int(lengths[cut[0]])) for cut in cuts]


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of special tokens, sorted. The unknown token stands for text and counts only where it doubles as another."""
    names = [
        name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name not in ("unk_token", "additional_special_tokens")
    ]
    marked = {getattr(tokenizer, f"{name}_id") for name in names} - {None}
    unknown = {tokenizer.unk_token_id} - marked
    return tuple(sorted((set(tokenizer.all_special_ids) | marked) - unknown))
