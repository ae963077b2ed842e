"""What extraction needs of others, as it sees them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from services.extraction.domain import (
    BaseModel,
    Cache,
    Extraction,
    Filter,
    Match,
    NewExtraction,
    Options,
    Rates,
    Survey,
)
from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.residency.texts import Sequences


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A dataset as token sequences, and what the manifest says about it."""

    sequences: Sequences
    description: dict[str, Any]
    """`id, digest, source, identifier, split, text_field` and the counts of `Sequences`."""


class Catalogue(Protocol):
    """The registry."""

    async def extension_uri(self, model_id: str, extension_id: str) -> str:
        """Handle of an extension's files.

        Raises:
            errors.Invalid: it is no lens of any group of this model.
        """

    async def model(self, model_id: str) -> BaseModel:
        """A registered model.

        Raises:
            errors.NotFound: `MODEL_NOT_FOUND`.
        """


class Datasets(Protocol):
    """Registered text."""

    async def survey(self, dataset_id: str, model: BaseModel) -> Survey:
        """Look at a dataset that this model is to read, without tokenising it.

        Raises:
            errors.NotFound: there is none.
            errors.Invalid: it cannot be read, or has no row.
        """

    async def require_usable(self, dataset_id: str, options: Options, model: BaseModel) -> None:
        """That some of its tokens would be rows, as far as its first rows or earlier counts tell.

        Raises:
            errors.NotFound: there is none.
            errors.Invalid: it cannot be read, or holds nothing usable.
        """

    async def tokenize(self, dataset_id: str, options: Options, tokenizer: Any, vocab_size: int) -> Tokenized:
        """Its rows as token sequences, cut as the options say.

        Raises:
            errors.NotFound: there is none.
            errors.Invalid: it cannot be read, or has no usable row.
        """


class Store(Protocol):
    """Extractions and caches as rows."""

    def new_id(self) -> str:
        """An unused extraction id."""

    async def queue(self, new: NewExtraction, key: RequestKey) -> Extraction:
        """Store an extraction and queue its job, or answer what the same request got before.

        Raises:
            errors.Exhausted: `QUEUE_FULL`.
            errors.Conflict: `REQUEST_ID_REUSED`.
        """

    async def reuse(self, new: NewExtraction, cache_id: str, key: RequestKey) -> Extraction:
        """Store an extraction that a cache answers, or answer what the same request got before.

        Raises:
            errors.Conflict: `REQUEST_ID_REUSED`.
        """

    async def get(self, extraction_id: str) -> Extraction:
        """One extraction.

        Raises:
            errors.NotFound: there is none.
        """

    async def list(self, wanted: Filter) -> Page:
        """Extractions, newest first."""

    async def cancel(self, extraction_id: str) -> None:
        """Ask its job to stop.

        Raises:
            errors.Conflict: it has completed or failed already.
        """

    async def pause(self, extraction_id: str) -> None:
        """Ask its job to stop for now.

        Raises:
            errors.Conflict: it has ended, or its cache is being made.
        """

    async def resume(self, extraction_id: str) -> None:
        """Queue its job again.

        Raises:
            errors.Conflict: it is not paused.
        """

    async def delete(self, extraction_id: str) -> None:
        """Forget an extraction; its cache stays.

        Raises:
            errors.Conflict: it has not ended.
        """

    async def rates(self, model_id: str, dataset_id: str, options: Options) -> Rates:
        """What the last similar extractions took."""


class Caches(Protocol):
    """Published caches: rows and files."""

    @property
    def limit_bytes(self) -> int:
        """Most bytes of caches on this host."""

    async def find(self, key: str, hook_points: Collection[str]) -> Cache | None:
        """A cache of this key, young enough to be reused, that holds all these hook points; the smallest one."""

    async def get(self, cache_id: str) -> Cache:
        """One cache.

        Raises:
            errors.NotFound: there is none.
        """

    async def list(self, wanted: Filter) -> Page:
        """Caches, newest first."""

    async def delete(self, cache_id: str) -> None:
        """Delete rows and files.

        Raises:
            errors.Conflict: `IN_USE`: somebody reads it.
        """

    async def touch(self, cache_id: str) -> None:
        """It was used just now."""

    def reading(self, cache: Cache) -> AbstractAsyncContextManager[Path]:
        """Its directory, which is not deleted inside the block.

        Raises:
            errors.NotFound: it is being deleted.
            errors.Failed: `ARTIFACT_LOST`.
        """


class UnitFiles(Protocol):
    """Units that this process made for jobs of other hosts."""

    def find(self, extraction_id: str, unit: int, fence: int, *, sums: bool) -> Path | None:
        """The shard of a unit, or the file of its sums."""


class Place(Protocol):
    """A directory that a reader on this host offers for blocks."""

    async def put(self, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
        """Write a block once the reader has left room for it; the file's name and bytes.

        Raises:
            errors.Exhausted: `CACHE_FULL`.
        """


class Places(Protocol):
    """Directories of readers."""

    def find(self, name: str) -> Place | None:
        """A reader's directory, None where this host does not have it."""


class Meters(Protocol):
    """Figures for operators."""

    def asked(self, match: Match) -> None:
        """A request was answered so."""
