"""Held-out text of registered datasets, as batches of token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from services.kit import errors
from services.residency.catalogue import Catalogue
from services.residency.families import Facts
from services.residency.texts import (
    DatasetError,
    DatasetRecord,
    Sequences,
    open_rows,
    plan_batches,
    special_ids,
    tokenize,
)
from services.training.domain import WantedEvaluation
from services.training.job_ports import Batch, KnownModel

T = TypeVar("T")
MOST_DEFAULT_LENGTH = 1024
SPARE = 2
"""Rows that are looked at for every sequence that is wanted: some may hold no text."""


class RegisteredTexts:
    """Implements the port `HeldOut`."""

    def __init__(self, catalogue: Catalogue, roots: Sequence[Path], cache_dir: Path) -> None:
        """Use these.

        Args:
            catalogue: the registry's datasets.
            roots: directories below which local datasets lie.
            cache_dir: where downloads and conversions are kept.
        """
        self._catalogue = catalogue
        self._roots = roots
        self._cache_dir = cache_dir

    async def batches(self, wanted: WantedEvaluation, model: KnownModel, most: int) -> list[Batch]:
        """The dataset's first rows; tokenised beside the event loop."""
        return await self._reading(wanted.dataset_id, self._batches, wanted, model.tokenizer, model.facts, most)

    async def sequences(self, dataset_id: str, tokenizer: Any, facts: Facts) -> Sequences:
        """All of a dataset.

        Raises:
            errors.Invalid: it cannot be read, or has no usable row.
        """
        return await self._reading(dataset_id, self._sequences, tokenizer, facts)

    async def _reading(self, dataset_id: str, work: Callable[..., T], *arguments: Any) -> T:
        record = await self._catalogue.readable(await self._catalogue.dataset(dataset_id))
        try:
            return await asyncio.to_thread(work, record, *arguments)
        except DatasetError as error:
            raise errors.Invalid(
                error.message, reason="DATASET_UNUSABLE", violations=[(error.field, error.message)]
            ) from error

    def _batches(
        self, record: DatasetRecord, wanted: WantedEvaluation, tokenizer: Any, facts: Facts, most: int
    ) -> list[Batch]:
        if wanted.max_length > facts.context_length:
            raise errors.Invalid.of("max_length", f"the model's context is {facts.context_length} tokens")
        size = wanted.batch_size or facts.model_batch_size
        sequences = self._sequences(record, tokenizer, facts, wanted.max_length, SPARE * most * size)
        chosen = np.arange(min(len(sequences), most * size))
        uncounted = torch.tensor(special_ids(tokenizer) if tokenizer is not None else (), dtype=torch.int64)
        found = []
        for batch in plan_batches(sequences.lengths, size, chosen):
            ids, mask = map(torch.from_numpy, sequences.padded(batch.indices, batch.length))
            found.append((ids, mask, mask * ~torch.isin(ids, uncounted)))
        return found

    def _sequences(
        self, record: DatasetRecord, tokenizer: Any, facts: Facts, length: int = 0, most_rows: int | None = None
    ) -> Sequences:
        rows = open_rows(record, self._roots, self._cache_dir)
        if tokenizer is None and not rows.tokenized:
            raise DatasetError("dataset_id", "the model has no tokenizer; give a dataset that is tokenised already")
        length = length or min(facts.context_length, MOST_DEFAULT_LENGTH)
        limit = None if most_rows is None else min(len(rows), most_rows)
        return tokenize(rows, tokenizer, length, limit, facts.vocab_size)
