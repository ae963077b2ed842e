"""Files below the dataset roots: where an identifier leads, how much there is, and a digest of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from services.kit.errors import Invalid


class RootedDatasets:
    """Implements DatasetFiles."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots

    async def measure(self, identifier: str) -> tuple[int, str]:
        """Bytes and content digest, read on a thread."""
        return await asyncio.to_thread(_measure, self._find(identifier))

    def _find(self, identifier: str) -> Path:
        """The first root that has it wins; symbolic links are resolved, and may not lead outside.

        Raises:
            Invalid: names `identifier`; says nothing about paths.
        """
        for root in self._roots:
            base = root.resolve()
            path = (base / identifier).resolve()
            if path != base and path.is_relative_to(base) and path.exists():
                return path
        raise Invalid.of("identifier", "no such file or directory below the dataset roots")


def _measure(path: Path) -> tuple[int, str]:
    """blake3 over relative names and the digests of the files' contents, in the order of the names."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise Invalid.of("identifier", "the directory is empty")
    size, digest = 0, blake3()
    try:
        for file in files:
            size += file.stat().st_size
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            digest.update(blake3(max_threads=blake3.AUTO).update_mmap(file).digest())
    except OSError as error:
        raise Invalid.of("identifier", "a file cannot be read") from error
    return size, digest.hexdigest()
