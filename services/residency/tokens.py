"""Tokenised datasets on this host, so that a resumed, a repeated or a wider extraction does not tokenise again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from services.residency.texts import Sequences, special_ids

ARRAYS = ("ids", "offsets", "rows", "starts", "firsts", "spans")
COUNTS = ("rows_read", "bad_rows", "truncated_rows", "truncated_tokens")
LIMIT_BYTES = 10 * 10**9
"""Most bytes kept; what was used least recently goes first."""


class TokenStore:
    """Files named by the digest of whatever decides their content. Each may vanish at any time: it is made again."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit = limit_bytes

    def load(self, name: str) -> Sequences | None:
        """What `save` was given under this name; None where it is not there, or not what was written."""
        path = self._path(name)
        try:
            with safe_open(path, framework="np") as file:
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                told = json.loads(file.metadata()["lensmesh"])
            os.utime(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        if _digest(arrays) != told.get("digest"):
            return None
        return Sequences(**arrays, **{key: told[key] for key in COUNTS})

    def counted(self, name: str) -> int | None:
        """Tokens that are no special ones, of what `save` was given under this name; None where that is not known."""
        try:
            with safe_open(self._path(name), framework="np") as file:
                return json.loads(file.metadata()["lensmesh"]).get("counted")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, name: str, sequences: Sequences, special_ids: SequenceOf[int] = ()) -> None:
        """Keep sequences, and how many tokens are not special; a full disk only means that they are not kept."""
        arrays = {key: np.ascontiguousarray(array) for key in ARRAYS if (array := getattr(sequences, key)) is not None}
        told = {key: getattr(sequences, key) for key in COUNTS} | {"digest": _digest(arrays)}
        told["counted"] = int(sequences.counted(special_ids).sum())
        path = self._path(name)
        staged = path.with_name(f".{name}.{uuid4().hex}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as file:
                file.write(save(arrays, metadata={"lensmesh": json.dumps(told)}))
                file.flush()
                os.fsync(file.fileno())
            staged.rename(path)
        except OSError:
            staged.unlink(missing_ok=True)
        self._tidy()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _tidy(self) -> None:
        with suppress(OSError):
            files = sorted(
                ((path.stat(), path) for path in self._folder.iterdir()), key=lambda found: found[0].st_mtime
            )
            used = sum(status.st_size for status, _ in files)
            for status, path in files:
                if used <= self._limit:
                    return
                path.unlink()
                used -= status.st_size


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = blake3()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(arrays[key].tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """blake3 of what decides a tokenizer's output, hexadecimal; truncation and padding, which calls set, left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for name in ("truncation", "padding"):
        state.pop(name, None)
    content = {"backend": state, "special": special_ids(tokenizer)}
    return blake3(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
