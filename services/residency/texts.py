"""Rows of a dataset, as texts, as pairs of prompt and target, or as token sequences in deterministic batches.

    rows = open_rows(record, roots)                          # hub, local file or directory, or the record's own texts
    sequences = tokenize(rows, tokenizer, max_length=256)    # flat token ids; bad rows are counted
    for batch in plan_batches(sequences.lengths, 32):        # length buckets, the same ones every time
        ids, mask = sequences.padded(batch.indices, batch.length)    # int64 [B, S], right-padded; mask 1 on real tokens

Nothing here needs torch: `torch.from_numpy` makes tensors of the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from blake3 import blake3

Source = Literal["huggingface", "local", "inline"]

INPUT_IDS = "input_ids"
"""Column of token ids; a dataset that has it, and not its text column, counts as tokenised already."""

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences, at most one per dataset row, in the dataset's order.

    Attributes:
        ids: int32 [tokens], one sequence after the other.
        offsets: int64 [n + 1]; sequence i is ids[offsets[i]:offsets[i + 1]]. None is empty.
        rows: int64 [n], the dataset row of each sequence; its first token is the row's first token.
        rows_read: dataset rows that were looked at.
        bad_rows: rows without usable text or ids.
        truncated_rows: rows that were longer than max_length.
        truncated_tokens: tokens that were cut off.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    rows_read: int
    bad_rows: int
    truncated_rows: int
    truncated_tokens: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [n]."""
        return np.diff(self.offsets)

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

    def limited(self, max_tokens: int, uncounted_ids: Sequence[int] = ()) -> Sequences:
        """The beginning that holds `max_tokens` tokens, not counting `uncounted_ids`; it may end within a sequence."""
        counted = np.cumsum(~np.isin(self.ids, np.asarray(uncounted_ids, dtype=np.int32)))
        if max_tokens >= counted[-1]:
            return self
        max_tokens = int(np.searchsorted(counted, max_tokens)) + 1
        count = int(np.searchsorted(self.offsets, max_tokens))
        offsets = np.minimum(self.offsets[: count + 1], max_tokens)
        return Sequences(
            self.ids[:max_tokens],
            offsets,
            self.rows[:count],
            self.rows_read,
            self.bad_rows,
            self.truncated_rows,
            self.truncated_tokens,
        )


def tokenize(
    rows: Rows, tokenizer: Any, max_length: int, row_limit: int | None = None, vocab_size: int | None = None
) -> Sequences:
    """Tokenise the first `row_limit` rows (all when None) with the tokenizer's own special tokens.

    Args:
        rows: an opened dataset.
        tokenizer: a Hugging Face tokenizer, fast ones run in parallel; unused for a tokenised dataset.
        max_length: tokens kept of a row; what is cut off is counted.
        row_limit: rows to look at.
        vocab_size: ids at or above it make a row of a tokenised dataset bad.

    Raises:
        DatasetError: row_limit is beyond the dataset (`sample_count`), or no row is usable (`dataset_id`).
    """
    if row_limit is not None and row_limit > len(rows):
        raise DatasetError("sample_count", f"the dataset has {len(rows)} rows, {row_limit} were asked for")
    stop = len(rows) if row_limit is None else row_limit
    kept: list[np.ndarray] = []
    origin: list[int] = []
    truncated_rows = truncated_tokens = 0
    for row, ids in enumerate(_encoded(rows, tokenizer, stop)):
        if ids is None or not len(ids):
            continue
        if rows.tokenized and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
            continue
        if len(ids) > max_length:
            truncated_rows += 1
            truncated_tokens += len(ids) - max_length
        kept.append(np.asarray(ids[:max_length], dtype=np.int32))
        origin.append(row)
    if not kept:
        raise DatasetError("dataset_id", f"none of the dataset's {stop} rows holds usable text")
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in kept], out=offsets[1:])
    return Sequences(
        ids=np.concatenate(kept),
        offsets=offsets,
        rows=np.asarray(origin, dtype=np.int64),
        rows_read=stop,
        bad_rows=stop - len(kept),
        truncated_rows=truncated_rows,
        truncated_tokens=truncated_tokens,
    )


def _encoded(rows: Rows, tokenizer: Any, stop: int) -> Iterator[Sequence[int] | None]:
    if rows.tokenized:
        yield from rows.token_ids(0, stop)
        return
    for low in range(0, stop, _CHUNK):
        texts = list(rows.texts(low, min(low + _CHUNK, stop)))
        usable = [text for text in texts if text is not None]
        # verbose=False: the tokenizer warns about long texts, which are cut here, where the cut is counted.
        encoded = iter(tokenizer(usable, verbose=False)[INPUT_IDS] if usable else ())
        for text in texts:
            yield None if text is None else next(encoded)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that go through the model together: `indices` int64 [B], padded to `length` tokens."""

    indices: np.ndarray
    length: int


def plan_batches(lengths: np.ndarray, batch_size: int, indices: np.ndarray | None = None) -> list[Batch]:
    """Batches of at most `batch_size` sequences of similar length, the longest first.

    The longest first, so that a batch that does not fit the memory fails at once and not at the end. Which of several
    sequences of one length come first is decided by the order of `indices`; within a batch the smaller index comes
    first, so that a batch can be made again from its members alone.

    Args:
        lengths: tokens of every sequence, int [n].
        batch_size: most sequences of a batch, at least 1.
        indices: plan only these sequences; all when None.
    """
    chosen = np.arange(len(lengths)) if indices is None else np.asarray(indices, dtype=np.int64)
    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
    cuts = [ordered[low : low + batch_size] for low in range(0, len(ordered), batch_size)]
    return [Batch(cut[np.lexsort((cut, -lengths[cut]))], int(lengths[cut[0]])) for cut in cuts]


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of special tokens, sorted. The unknown token stands for text and counts only where it doubles as another."""
    names = [
        name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name not in ("unk_token", "additional_special_tokens")
    ]
    marked = {getattr(tokenizer, f"{name}_id") for name in names} - {None}
    unknown = {tokenizer.unk_token_id} - marked
    return tuple(sorted((set(tokenizer.all_special_ids) | marked) - unknown))


def tokenizer_digest(tokenizer: Any) -> str:
    """blake3 of what decides a tokenizer's output, hexadecimal; truncation and padding, which calls set, left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for name in ("truncation", "padding"):
        state.pop(name, None)
    content = {"backend": state, "special": special_ids(tokenizer)}
    return blake3(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
