"""Files of units and caches on this host: written once, flushed, hashed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor

from services.extraction.adapters.tensor_files import write_tensors
from services.residency.shards import FileEntry, file_digest

_OWNER = "owner"
_PLAN = "plan.safetensors"


class WorkFolder:
    """Plan and units of an unfinished extraction, beside the artifact store so that they can be linked into it.

    A file's name holds the fence under which it was written; it counts only once a row names it.
    """

    PLACE = ".extractions"

    def __init__(self, root: Path, extraction_id: str) -> None:
        self.extraction_id = extraction_id
        self._path = root / self.PLACE / extraction_id

    @classmethod
    def present(cls, root: Path) -> list[str]:
        """Extractions that have a folder."""
        place = root / cls.PLACE
        return sorted(path.name for path in place.iterdir()) if place.is_dir() else []

    def open(self, fence: int | None = None) -> None:
        """Make the folder; `fence` is the claim of the job's own worker, None for who helps it from another host."""
        self._path.mkdir(parents=True, exist_ok=True)
        if fence is not None:
            (self._path / _OWNER).write_text(str(fence))

    def opened_under(self, fence: int) -> bool:
        """Whether the worker with this claim of the job has its folder here, on this very disk."""
        owner = self._path / _OWNER
        return owner.is_file() and owner.read_text() == str(fence)

    def write_plan(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what a plan was cut into; either the whole file is there or the former one.

        Raises:
            FileNotFoundError: the folder is not open.
        """
        staged = self._path / f".{_PLAN}"
        write_tensors(staged, {name: torch.from_numpy(array) for name, array in arrays.items()})
        staged.replace(self._path / _PLAN)
        _sync(self._path)

    def read_plan(self) -> dict[str, np.ndarray] | None:
        """What `write_plan` kept, maybe damaged; None where no file is there, or none that can be read."""
        try:
            return load_arrays(self._path / _PLAN)
        except (OSError, SafetensorError):
            return None

    def shard(self, unit: int, fence: int) -> Path:
        """File of a unit's shard."""
        return self._path / f"unit-{unit:05d}.{fence}.safetensors"

    def moments(self, unit: int, fence: int) -> Path:
        """File of a unit's sums."""
        return self._path / f"unit-{unit:05d}.{fence}.moments.safetensors"

    def write(self, unit: int, fence: int, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> FileEntry:
        """Write a unit; returns the shard's entry. Whatever an earlier try left is replaced.

        Raises:
            FileNotFoundError: the folder is not open, or was discarded.
        """
        write_tensors(self.moments(unit, fence), moments)
        entry = write_tensors(self.shard(unit, fence), tensors)
        _sync(self._path)
        return entry

    def intact(self, unit: int, fence: int, size_bytes: int, digest: str) -> bool:
        """Whether a unit's files are there as they were written."""
        shard = self.shard(unit, fence)
        if not shard.is_file() or not self.moments(unit, fence).is_file() or shard.stat().st_size != size_bytes:
            return False
        return file_digest(shard) == digest

    def read_moments(self, unit: int, fence: int) -> dict[str, Tensor]:
        """A unit's sums."""
        return load_file(self.moments(unit, fence))

    def discard_unit(self, unit: int, fence: int) -> None:
        """Delete a unit's files, and the folder where nothing else is in it."""
        for path in (self.shard(unit, fence), self.moments(unit, fence)):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._path.rmdir()

    def discard(self) -> None:
        """Delete everything."""
        shutil.rmtree(self._path, ignore_errors=True)


class WorkFolders:
    """Implements the port `UnitFiles`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, extraction_id: str, unit: int, fence: int, *, sums: bool) -> Path | None:
        """In the extraction's folder."""
        folder = WorkFolder(self._root, extraction_id)
        path = folder.moments(unit, fence) if sums else folder.shard(unit, fence)
        return path if path.is_file() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
