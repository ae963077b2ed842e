"""Directories of readers on this host, in which a stream's blocks are handed over as files."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from services.kit.artifacts import STAGING, full_disk_named
from services.kit.ids import new_id

WINDOW = 4
"""Blocks that wait for their reader."""
LOOK_SECONDS = 0.002
_NAME = re.compile(r"stream_[0-9a-f]{16}")


class StagedPlaces:
    """Implements the port `Places` below an artifact store's staging area."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, name: str) -> StagedPlace | None:
        """By its random name, which nobody but its reader knows."""
        path = self._root / STAGING / name
        return StagedPlace(path) if _NAME.fullmatch(name) and path.is_dir() else None


class StagedPlace:
    """Implements the port `Place`: a block's reader deletes its name as soon as the file is mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._call = new_id("block")
        self._written = 0
        self._waiting: list[Path] = []

    async def put(self, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
        """Not flushed: the file lives for moments."""
        while len(self._waiting) >= WINDOW:
            self._waiting = [path for path in self._waiting if path.exists()]
            if len(self._waiting) >= WINDOW:
                await asyncio.sleep(LOOK_SECONDS)
        path = self._path / f"{self._call}-{self._written}"
        with full_disk_named():
            await asyncio.to_thread(save_file, dict(tensors), path)
        self._written += 1
        self._waiting.append(path)
        return path.name, path.stat().st_size
