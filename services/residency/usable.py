"""Whether a dataset can be used at all, told from its first rows rather than from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.residency.texts import DatasetError, Encoding, Rows, tokenize

LOOKED_AT = (1, 100, 10_000)
"""Rows that are tried, fewer first: with a good dataset the first one does. Of a larger one without a usable row among
these nothing is said."""


def require_usable(
    rows: Rows,
    tokenizer: Any,
    encoding: Encoding,
    *,
    row_limit: int | None = None,
    vocab_size: int | None = None,
    uncounted_ids: Sequence[int] = (),
) -> None:
    """That some token of a dataset counts, as far as its first rows tell.

    Args:
        rows: an opened dataset.
        tokenizer: a Hugging Face tokenizer; unused for a tokenised dataset.
        encoding: how rows become sequences.
        row_limit: rows that will be used; all when None.
        vocab_size: ids at or above it make a row of a tokenised dataset bad.
        uncounted_ids: token ids that are no rows.

    Raises:
        DatasetError: as `tokenize`; or every token is an uncounted one (`dataset_id`).
    """
    stop = len(rows) if row_limit is None else row_limit
    for count in sorted({min(stop, most) for most in LOOKED_AT}):
        try:
            found = tokenize(rows, tokenizer, encoding, count, vocab_size)
        except DatasetError as error:
            if count == stop or error.field != "dataset_id":
                raise
            continue
        if found.counted(uncounted_ids).any():
            return
        if count == stop:
            raise DatasetError("dataset_id", "every token of the dataset is a special token")
