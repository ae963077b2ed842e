"""Write safetensors files past the page cache: what is written once and read later, if ever, on any host.

On a host where a new page is dear (a virtual machine), copying into the page cache costs several times what hashing
does. Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, JSON header, data).
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from services.residency.checkpoint import DTYPES
from services.residency.shards import FileEntry

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 512 * 1024
"""Bytes: what is copied is hashed while it is in the cache."""
_ALIGNED = 4096
"""What direct writes and their places must be multiples of."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file, flush it to the disk and hash it; the same tensors give the same bytes.

    Args:
        path: made anew, or replaced.
        tensors: on the CPU, of any shape and of the dtypes that safetensors has.
    """
    # Wider numbers first, so that every tensor begins at a multiple of its number's bytes.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    file = _DirectFile(path)
    try:
        file.write(memoryview(_header(ordered)))
        for _, tensor in ordered:
            if tensor.numel():
                file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        return file.finish()
    finally:
        file.close()


def _header(tensors: list[tuple[str, Tensor]]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _DirectFile:
    """A file that is written from its start to its end, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._block = mmap.mmap(-1, _BLOCK)  # direct writes come from aligned memory
        self._filled = 0
        self._size = 0
        self._hash = blake3()

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            part, data = data[: _BLOCK - self._filled], data[_BLOCK - self._filled :]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == _BLOCK:
                self._empty()

    def finish(self) -> FileEntry:
        """Write what is left, cut the last write to the file's size and wait for the disk."""
        self._empty()
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        return FileEntry(self._path.name, self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _empty(self) -> None:
        with memoryview(self._block) as block:
            self._hash.update(block[: self._filled])
            self._size += self._filled
            rest = block[: self._filled + -self._filled % _ALIGNED]
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._filled = 0


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without direct writes says so
            raise
        return os.open(path, flags, 0o644)
