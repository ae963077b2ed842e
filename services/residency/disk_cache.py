"""Weights on this machine's disk: quantised ones, so that a later load skips quantising, and what the hub gave."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import nn

from services.kit.ids import new_id
from services.residency.kernels import BITSANDBYTES, kernel_of
from services.residency.loading import PART, persistent_buffers
from services.residency.quantize import parts_of

_WEIGHTS, _DIGEST, _STAGING = "weights.safetensors", "blake3", ".staging-"
_ABANDONED_SECONDS = 3600
"""Nobody writes for so long: the process died."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Something on the disk that can be had again."""

    name: str
    size: int
    used: float
    drop: Callable[[], object]


class DiskCache:
    """What may be deleted at any time: over its limit the least recently used goes first."""

    def __init__(self, folder: Path, hub: Path, limit: int) -> None:
        """Use folders, which need not exist.

        Args:
            folder: quantised weights.
            hub: models downloaded from the hub.
            limit: most bytes of both together.
        """
        self._folder, self._hub, self._limit = folder, hub, limit

    def find(self, digest: str, quantization: str, device: str) -> Path | None:
        """The quantised weights of a model, whole and unharmed; None where there are none.

        Args:
            digest: of the model's own files.
            quantization: int8 or int4.
            device: torch device that they were quantised on; kinds of devices round differently.
        """
        entry = self._folder / _key(digest, quantization, device)
        try:
            whole = (entry / _DIGEST).read_text() == _digest_of(entry / _WEIGHTS)
        except OSError:
            return None
        if not whole:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry)
        return entry / _WEIGHTS

    def keep(self, model: nn.Module, digest: str, quantization: str, device: str) -> bool:
        """Write a model's quantised weights; false, and nothing is left, where the disk or the limit has no room."""
        entry = self._folder / _key(digest, quantization, device)
        staging = self._folder / (_STAGING + new_id("q"))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
        if entry.exists() or sum(tensor.nbytes for tensor in tensors.values()) > self._limit:
            return entry.exists()
        try:
            staging.mkdir(parents=True)
            save_file(tensors, staging / _WEIGHTS)
            _flush(staging / _WEIGHTS)
            (staging / _DIGEST).write_text(_digest_of(staging / _WEIGHTS))
            staging.rename(entry)
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            return False
        self.trim(keep=entry)
        return True

    def use(self, download: Path) -> None:
        """A hub model is about to be read: it leaves last, whatever the file system knows, and others until it fits.

        Args:
            download: its snapshot.
        """
        os.utime(download / "config.json")
        self.trim(keep=download.resolve())

    def trim(self, keep: Path | None = None) -> int:
        """Delete the least recently used until the rest fits the limit, `keep` aside; bytes that came back."""
        for staging in self._folder.glob(_STAGING + "*"):
            if staging.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(staging, ignore_errors=True)
        kept = sorted((*self._quantized(keep), *self._downloaded(keep)), key=lambda each: each.used)
        surplus = sum(each.size for each in kept) + (_size(keep) if keep is not None else 0) - self._limit
        freed = 0
        for each in kept:
            if freed >= surplus:
                break
            with suppress(OSError):
                each.drop()
                freed += each.size
        return freed

    def forget(self, digest: str, hub_id: str) -> int:
        """Delete what is kept of one model; bytes that came back.

        Args:
            digest: of the model's own files; nothing was quantised from them when empty.
            hub_id: `owner/name` of a download; none when empty.
        """
        gone = [each for each in self._quantized(None) if digest and each.name.startswith(f"{digest}-")]
        gone += [each for each in self._downloaded(None) if each.name == hub_id]
        for each in gone:
            each.drop()
        return sum(each.size for each in gone)

    def _quantized(self, keep: Path | None) -> Iterator[_Kept]:
        for entry in self._folder.glob("[!.]*"):
            if entry != keep:
                yield _Kept(entry.name, _size(entry), entry.stat().st_mtime, partial(shutil.rmtree, entry))

    def _downloaded(self, keep: Path | None) -> Iterator[_Kept]:
        if not self._hub.is_dir():
            return
        from huggingface_hub import scan_cache_dir  # noqa: PLC0415 - only hub models need it

        found = scan_cache_dir(self._hub)
        for repository in found.repos:
            if keep is not None and keep.is_relative_to(repository.repo_path):
                continue
            drop = found.delete_revisions(*(revision.commit_hash for revision in repository.revisions)).execute
            yield _Kept(repository.repo_id, repository.size_on_disk, repository.last_accessed, drop)


def _key(digest: str, quantization: str, device: str) -> str:
    kernel = kernel_of(quantization, device)
    made_by = f"{kernel}-{version('bitsandbytes')}" if kernel == BITSANDBYTES else kernel
    return f"{digest}-{quantization}-{device.partition(':')[0]}-{made_by}"


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the model once, quantised modules as their parts, by the names that `loading.fill` reads."""
    quantized = {path: parts for path, module in model.named_modules() if (parts := parts_of(module))}
    found = {f"{path}{PART}{name}": part for path, parts in quantized.items() for name, part in parts.items()}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in quantized:
            found[name] = parameter
    return found | persistent_buffers(model)


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.glob("*"))


def _digest_of(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
