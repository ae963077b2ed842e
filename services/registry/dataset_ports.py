"""Datasets, and what the operations need of them: their rows, and files on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from services.registry.listing import Listed, Page


@dataclass(frozen=True, slots=True)
class Dataset:
    """Registered text."""

    id: str
    name: str
    source: str
    identifier: str
    split: str
    text_field: str
    prompt_field: str | None
    target_field: str | None
    size_bytes: int
    rows: int | None
    digest: str | None
    created_by: str
    created_at: datetime


class DatasetRows(Protocol):
    """Datasets, within one transaction."""

    async def insert(self, row: Mapping[str, Any], texts: Sequence[str]) -> Dataset:
        """Add a dataset, with the texts of an inline one."""

    async def get(self, dataset_id: str) -> Dataset:
        """One dataset.

        Raises:
            NotFound: there is none.
        """

    async def page(self, page: Page) -> Listed:
        """Datasets, newest first."""

    async def delete(self, dataset_id: str) -> None:
        """Remove it."""

    async def users(self, dataset_id: str) -> list[str]:
        """Unfinished jobs that read it."""

    async def texts(self, dataset_id: str, after: int, limit: int) -> list[str]:
        """Texts of an inline dataset from a position."""


class DatasetFiles(Protocol):
    """Files below the dataset roots."""

    async def measure(self, identifier: str) -> tuple[int, str]:
        """Bytes and content digest of a file or directory.

        Raises:
            Invalid: there is none below any root, or it leads outside.
        """
