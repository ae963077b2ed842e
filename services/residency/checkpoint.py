"""Read safetensors checkpoints into private memory.

Files are read, not mapped: a mapped file that is truncated while it is in use kills the process with SIGBUS, and
memory figures of a mapping are the page cache's. Format: https://huggingface.co/docs/safetensors (8 bytes of
little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_SMALLEST_READ = 64 * 1024
_LARGEST_READ = 32 * 1024 * 1024
_MAPPED_FROM = 64 * 1024
_READERS = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be read. The message names files by their bare name and says the way out."""


class PickleRefused(CheckpointError):
    """The weights are pickles, which can run code when they are read; the message says the way out."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: where its bytes lie in which file."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _entry(file: Path, name: str, stored: object, data_start: int, data_end: int) -> Entry:
    try:
        dtype = DTYPES[stored["dtype"]]  # type: ignore[index]
        shape = tuple(int(size) for size in stored["shape"])  # type: ignore[index]
        begin, end = (int(offset) for offset in stored["data_offsets"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: the header entry of {name[:100]!r} is not valid") from error
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file.name}: {name[:100]!r} does not have as many bytes as its shape says")
    if data_start + end > data_end:
        raise CheckpointError(f"{file.name} is truncated: {data_start + end - data_end} bytes are missing")
    return Entry(name, file.name, dtype, shape, data_start + begin, end - begin)


def read_header(file: Path) -> list[Entry]:
    """The tensors of one safetensors file in the order of their bytes; reads the header only.

    Raises:
        CheckpointError: the file is truncated or is no valid safetensors file.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{file.name} is truncated or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file.name}: the header is no JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: the header is no JSON object")
    header.pop("__metadata__", None)
    entries = [_entry(file, name, stored, 8 + length, size) for name, stored in header.items()]
    entries.sort(key=lambda entry: entry.start)
    for before, after in pairwise(entries):
        if before.start + before.nbytes > after.start:
            raise CheckpointError(f"{file.name}: {before.name[:100]!r} and {after.name[:100]!r} overlap")
    return entries


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in a directory: those of the index, else the one file there is.

    Raises:
        CheckpointError: there are none, or some of the index are missing; pickles are named and the way out said.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("model.safetensors.index.json is not valid") from error
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError("model.safetensors.index.json names files outside its directory")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}")
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    single = [file for file in found if file.name == "model.safetensors"] or found
    if len(single) == 1:
        return single
    if single:
        raise CheckpointError("there are several .safetensors files and no model.safetensors.index.json")
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise PickleRefused(
            f"{pickles[0]} is a pickle, which can run code when it is read; save the model again with "
            "model.save_pretrained(path, safe_serialization=True) and register that directory"
        )
    raise CheckpointError("there is no .safetensors file")


def read_headers(directory: Path) -> list[Entry]:
    """Every tensor of a model directory, file by file, in the order of their bytes.

    Raises:
        CheckpointError: see `weight_files` and `read_header`; also when two files hold the same tensor.
    """
    entries = [entry for file in weight_files(directory) for entry in read_header(file)]
    if len({entry.name for entry in entries}) != len(entries):
        raise CheckpointError("a tensor is stored twice")
    return entries


def read_tensors(
    directory: Path, entries: Sequence[Entry], on_bytes: Callable[[int], None]
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """The tensors in turn, each in its own private CPU memory; some of the next ones are read meanwhile.

    Args:
        directory: where the entries' files lie.
        entries: what `read_headers` gave, all or some.
        on_bytes: told how many more bytes were read, at least 20 times over the whole; what it raises ends the reading.

    Raises:
        CheckpointError: a file became shorter since its header was read.
        OSError: it cannot be read.
    """
    step = max(_SMALLEST_READ, min(_LARGEST_READ, sum(entry.nbytes for entry in entries) // 20))
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
    with ExitStack() as stack:
        files = {name: stack.enter_context(FileIO(directory / name)) for name in {entry.file for entry in entries}}
        stack.callback(readers.shutdown, cancel_futures=True)  # before the files are closed
        coming = deque[_Coming]()
        left, ahead = iter(entries), 0
        while True:
            while ahead < _READERS * step and (entry := next(left, None)):
                coming.append(_begin(readers, files[entry.file], entry, step))
                ahead += entry.nbytes
            if not coming:
                return
            found = coming.popleft()
            for part in found.parts:
                on_bytes(part.result())
            ahead -= found.entry.nbytes
            yield found.entry, found.raw.view(found.entry.dtype).reshape(found.entry.shape)


@dataclass(frozen=True, slots=True)
class _Coming:
    """A tensor that is being read."""

    entry: Entry
    raw: torch.Tensor
    parts: list[Future[int]]
    """How many bytes each of them reads."""


def _begin(readers: ThreadPoolExecutor, stream: FileIO, entry: Entry, step: int) -> _Coming:
    """Several threads read: most of the time goes into pages that are touched first."""
    raw = _private(entry.nbytes)
    buffer, starts = memoryview(raw.numpy()), range(0, entry.nbytes, step)
    parts = [
        readers.submit(_read, stream.fileno(), buffer[low : low + step], entry.start + low, entry) for low in starts
    ]
    return _Coming(entry, raw, parts)


def _private(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes]; large ones are mapped, so that what they took is free for others at once.

    torch allocates aligned, and glibc leaves a hole behind each freed aligned block that the next one does not fit
    into: a process that streams a model through such blocks may end up holding all of it.
    """
    if nbytes < _MAPPED_FROM:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def _read(file: int, buffer: memoryview, start: int, entry: Entry) -> int:
    left = buffer
    while left:
        count = os.preadv(file, [left], start)
        if not count:
            raise CheckpointError(f"{entry.file} is truncated inside {entry.name[:100]!r}")
        left, start = left[count:], start + count
    return len(buffer)
