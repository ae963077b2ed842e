"""Registered text: the record from the registry, the rows from their source, the tokens from the model's tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.extensions.domain import Documents
from services.kit import errors
from services.residency.catalogue import Catalogue
from services.residency.texts import DatasetError, DatasetRecord, Rows, open_rows, tokenize

UNCUT = 1 << 30
"""Tokens kept of a row: all, since rows are cut into examples afterwards."""


class RegisteredDatasets:
    """Implements the port `Datasets`."""

    def __init__(self, catalogue: Catalogue, roots: Sequence[Path]) -> None:
        """Use these.

        Args:
            catalogue: the registry's datasets.
            roots: directories below which local datasets lie.
        """
        self._catalogue = catalogue
        self._roots = roots

    async def paired(self, dataset_id: str) -> bool:
        """By the fields that were named at its registration."""
        dataset = await self._catalogue.dataset(dataset_id)
        return bool(dataset.prompt_field and dataset.target_field)

    async def documents(self, field: str, dataset_id: str, tokenizer: Any, vocab_size: int) -> Documents:
        """All usable rows; read and tokenised beside the event loop."""
        record = await self._catalogue.readable(await self._catalogue.dataset(dataset_id))
        try:
            return await asyncio.to_thread(_read, record, self._roots, tokenizer, vocab_size)
        except DatasetError as error:
            raise errors.Invalid.of(field, error.message) from error


def _read(record: DatasetRecord, roots: Sequence[Path], tokenizer: Any, vocab_size: int) -> Documents:
    rows = open_rows(record, roots)
    if rows.paired:
        return _pairs(rows, tokenizer)
    sequences = tokenize(rows, tokenizer, UNCUT, vocab_size=vocab_size)
    return Documents(texts=tuple(sequences.sequence(index).tolist() for index in range(len(sequences))))


def _pairs(rows: Rows, tokenizer: Any) -> Documents:
    """Prompts with the tokenizer's own special tokens, targets without."""
    usable = [pair for pair in rows.pairs() if pair is not None]
    if not usable:
        raise DatasetError("dataset_id", "no row has both a prompt and a target")
    prompts = tokenizer([prompt for prompt, _ in usable], verbose=False)["input_ids"]
    targets = tokenizer([target for _, target in usable], add_special_tokens=False, verbose=False)["input_ids"]
    return Documents(pairs=tuple(zip(prompts, targets, strict=True)))
