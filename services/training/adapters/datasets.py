"""Held-out text of registered datasets, as batches of token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.kit import errors
from services.residency.catalogue import Catalogue
from services.residency.families import Facts
from services.residency.texts import DatasetError, DatasetRecord, open_rows, plan_batches, special_ids, tokenize
from services.training.domain import WantedEvaluation
from services.training.job_ports import Batch, LeasedModel

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

    async def batches(self, wanted: WantedEvaluation, model: LeasedModel, most: int) -> list[Batch]:
        """The dataset's first rows; tokenised beside the event loop."""
        record = await self._catalogue.readable(await self._catalogue.dataset(wanted.dataset_id))
        try:
            return await asyncio.to_thread(self._batches, record, wanted, model.tokenizer, model.facts, most)
        except DatasetError as error:
            raise errors.Invalid(
                error.message, reason="DATASET_UNUSABLE", violations=[(error.field, error.message)]
            ) from error

    def _batches(
        self, record: DatasetRecord, wanted: WantedEvaluation, tokenizer: Any, facts: Facts, most: int
    ) -> list[Batch]:
        if wanted.max_length > facts.context_length:
            raise errors.Invalid.of("max_length", f"the model's context is {facts.context_length} tokens")
        length = wanted.max_length or min(facts.context_length, MOST_DEFAULT_LENGTH)
        size = wanted.batch_size or facts.model_batch_size
        rows = open_rows(record, self._roots, self._cache_dir)
        if tokenizer is None and not rows.tokenized:
            raise DatasetError("dataset_id", "the model has no tokenizer; give a dataset that is tokenised already")
        limit = min(len(rows), SPARE * most * size)
        sequences = tokenize(rows, tokenizer, length, limit, facts.vocab_size)
        chosen = np.arange(min(len(sequences), most * size))
        uncounted = torch.tensor(special_ids(tokenizer) if tokenizer is not None else (), dtype=torch.int64)
        found = []
        for batch in plan_batches(sequences.lengths, size, chosen):
            ids, mask = map(torch.from_numpy, sequences.padded(batch.indices, batch.length))
            found.append((ids, mask, mask * ~torch.isin(ids, uncounted)))
        return found
