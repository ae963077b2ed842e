"""The cross-entropy of a batch, for decoder-only and encoder-decoder models. B examples, S positions, V vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from services.extensions.compute.examples import IGNORED, Examples


def logits_of(model: Any, batch: Examples) -> torch.Tensor:
    """Logits [B, S, V] of a batch with whatever extension is active.

    A causal model reads the rows; an encoder-decoder reads the ids in its encoder and the labels in its decoder.
    """
    device = next(model.parameters()).device
    ids = batch.ids.to(device)
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids, use_cache=False).logits
    return model(
        input_ids=ids,
        attention_mask=batch.mask.to(device) if batch.mask is not None else None,
        decoder_input_ids=_shifted(batch.labels.to(device), model.config),
        use_cache=False,
    ).logits


def loss_sum(model: Any, batch: Examples) -> torch.Tensor:
    """Summed cross-entropy of the batch's labels in nats, float32.

    A causal model predicts each label from the positions before it, an encoder-decoder at the label's own.
    """
    logits = logits_of(model, batch)
    labels = batch.labels.to(logits.device)
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.flatten(0, 1).float()
    return cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def label_count(model: Any, batch: Examples) -> int:
    """Number of labels that carry loss."""
    predicted = batch.labels if model.config.is_encoder_decoder else batch.labels[:, 1:]
    return int((predicted != IGNORED).sum())


@torch.no_grad()
def loss_of_batch(model: nn.Module, batch: Examples) -> tuple[float, int]:
    """(summed cross-entropy in nats, number of labels) of a batch."""
    return float(loss_sum(model, batch)), label_count(model, batch)


def held_out_loss(model: nn.Module, examples: Examples, batch_size: int = 8) -> float:
    """Mean cross-entropy in nats per label over all examples, summed in float64."""
    sums = [loss_of_batch(model, batch) for batch in examples.batches(batch_size)]
    return math.fsum(total for total, _ in sums) / sum(count for _, count in sums)


def _shifted(labels_BS: torch.Tensor, config: Any) -> torch.Tensor:
    """What the decoder reads: its start token, then every label but the last."""
    start = torch.full_like(labels_BS[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels_BS[:, :-1].masked_fill(labels_BS[:, :-1] == IGNORED, config.pad_token_id)], dim=1)
