"""Tokenizers of models whose weights need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from services.extraction.domain import BaseModel
from services.kit import errors
from services.residency.loading import LoadFailed, load_tokenizer
from services.residency.pool import Pool
from services.residency.sources import SourceNotFound, find_local


class Tokenizers:
    """Finds a model's tokenizer in this process, or else among the files of this host; nothing is downloaded."""

    def __init__(self, pool: Pool, model_roots: Sequence[Path], hub_dir: Path) -> None:
        """Use these.

        Args:
            pool: the models of this process.
            model_roots: directories below which local models lie.
            hub_dir: where the hub's downloads are kept.
        """
        self._pool = pool
        self._model_roots = model_roots
        self._hub_dir = hub_dir
        self._latest: tuple[str, Any] = ("", None)
        """Digest of a model's files, and its tokenizer."""

    def find(self, model: BaseModel) -> Any:
        """A model's tokenizer; None where it has none, or none is here. Reads files."""
        try:
            return self._pool.get(model.id).tokenizer
        except errors.Conflict:
            pass
        name, found = self._latest
        if found is None or name != model.digest:
            found = self._read(model)
            self._latest = (model.digest, found)
        return found

    def _read(self, model: BaseModel) -> Any:
        try:
            folder = self._folder(model)
            return load_tokenizer(folder) if folder is not None else None
        except (SourceNotFound, LoadFailed):  # the load of the model will say it
            return None

    def _folder(self, model: BaseModel) -> Path | None:
        if model.source != "huggingface":
            return find_local(model.identifier, self._model_roots)
        config = try_to_load_from_cache(
            model.identifier, "config.json", cache_dir=self._hub_dir, revision=model.revision or None
        )
        return Path(config).parent if isinstance(config, str) else None
