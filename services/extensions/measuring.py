"""Losses of an extension and its base, measured on a base that others use at the same time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from services.extensions import errors as translated
from services.extensions.compute.examples import Examples, from_pairs, from_prompts, from_texts
from services.extensions.compute.loss import logits_of, loss_of_batch
from services.extensions.domain import Documents
from services.extensions.ports import Base
from services.kit import errors
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import attachable

MAX_LENGTH = 512
"""Tokens of a row when the request names no length and the model's context is longer."""
BATCH_SIZE = 8
_KEYS = count()


@asynccontextmanager
async def attached(base: Base, folder: Path) -> AsyncIterator[str]:
    """Attach an extension's files under a key of our own; inactive, and detached after the block.

    Raises:
        errors.Conflict: the files do not fit the base, or are damaged.
    """
    key = f"extensions-service-{next(_KEYS)}"
    await base.run(_attach, base, key, folder)
    try:
        yield key
    finally:
        await base.run(base.attached.detach, key)


def _attach(base: Base, key: str, folder: Path) -> None:
    with translated.stored():
        base.attached.attach(key, attachable(folder, base.model, base_digest=base.digest))


def row_length(base: Base, asked: int) -> int:
    """Tokens of a row: what was asked for, else the model's context, at most `MAX_LENGTH`.

    Raises:
        errors.Invalid: more than the model's context was asked for; T5's relative positions have no such bound.
    """
    context = getattr(base.model.config, "max_position_embeddings", None)
    if context is None:
        return asked or MAX_LENGTH
    if asked > context:
        raise errors.Invalid.of("max_length", f"the model's context is {context} tokens, got {asked}")
    return asked or min(context, MAX_LENGTH)


def examples_for(field: str, base: Base, documents: Documents, length: int) -> Examples:
    """Rows of token ids of a dataset's documents.

    Raises:
        errors.Invalid: they give no row, or are no prompts and targets where an encoder-decoder needs them; names
            `field`.
    """
    separator = base.tokenizer.eos_token_id
    if separator is None:
        raise errors.Invalid.of("model_id", "the model's tokenizer has no end-of-sequence token")
    seq2seq = base.model.config.is_encoder_decoder
    if seq2seq and not documents.pairs:
        raise errors.Invalid.of(field, "has no targets; this model learns from a prompt_field and a target_field")
    try:
        if seq2seq:
            return from_prompts(documents.pairs, length, separator, base.model.config.pad_token_id)
        if documents.pairs:
            return from_pairs(documents.pairs, length, separator)
        return from_texts(documents.texts, length, separator)
    except ValueError as error:
        raise errors.Invalid.of(field, str(error)) from error


async def loss(base: Base, key: str | None, examples: Examples) -> tuple[float, int]:
    """(mean cross-entropy in nats per label, labels) with an extension, or of the bare base; one batch at a time."""
    total, labels = 0.0, 0
    for batch in examples.batches(BATCH_SIZE):
        batch_sum, batch_labels = await base.run(_loss_with, base.model, base.attached, key, batch)
        total, labels = total + batch_sum, labels + batch_labels
    return total / labels, labels


async def compare(base: Base, key: str, examples: Examples) -> dict[str, Any]:
    """Loss of the base and with the extension, and whether the base's logits are the same bits afterwards."""
    probe = examples.take(slice(1))
    before = await base.run(_base_logits, base.model, base.attached, probe)
    base_loss, labels = await loss(base, None, examples)
    with_extension, _ = await loss(base, key, examples)
    after = await base.run(_base_logits, base.model, base.attached, probe)
    return {
        "base_loss": base_loss,
        "loss": with_extension,
        "tokens": labels,
        "base_unchanged": torch.equal(before, after),
    }


def _loss_with(model: Any, extensions: Extensions, key: str | None, batch: Examples) -> tuple[float, int]:
    with extensions.using(key):
        return loss_of_batch(model, batch)


def _base_logits(model: Any, extensions: Extensions, batch: Examples) -> torch.Tensor:
    with extensions.using(None), torch.no_grad():
        return logits_of(model, batch)
