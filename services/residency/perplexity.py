"""Perplexity of a model on given token ids: how the cost of a quantization is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from services.residency.splice import logits, next_token_loss


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean loss), the mean loss in nats, and over how many predicted tokens."""

    perplexity: float
    loss: float
    tokens: int


def batch_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[float, int]:
    """(sum of losses in nats as float64, predicted tokens) of one right-padded batch, both [B, S]."""
    device = next(model.parameters()).device
    ids, mask = input_ids.to(device), attention_mask.to(device)
    losses = next_token_loss(logits(model, ids, mask), ids, mask)
    return losses.double().sum().item(), losses.numel()


def perplexity(parts: Iterable[tuple[float, int]]) -> Perplexity:
    """What the batches' losses come to, over every token but each sequence's first.

    Raises:
        ValueError: no sequence has two tokens.
    """
    total, count = 0.0, 0
    for loss, tokens in parts:
        total, count = total + loss, count + tokens
    if count == 0:
        raise ValueError("perplexity needs a sequence of at least two tokens")
    return Perplexity(math.exp(min(total / count, 700.0)), total / count, count)
