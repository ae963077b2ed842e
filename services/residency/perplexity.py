"""Perplexity of a model on given token ids: how the cost of a quantization is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from services.residency.splice import logits, next_token_loss


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean loss), the mean loss in nats, and over how many predicted tokens."""

    perplexity: float
    loss: float
    tokens: int


def measure(model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int = 8) -> Perplexity:
    """Perplexity over every token but each sequence's first; float64 sum.

    Args:
        model: a causal language model.
        sequences: token ids; those shorter than 2 predict nothing.
        batch_size: rows of one forward pass; sequences are taken in order and padded on the right.

    Raises:
        ValueError: no sequence has two tokens.
    """
    device = next(model.parameters()).device
    usable = [sequence for sequence in sequences if len(sequence) >= 2]
    if not usable:
        raise ValueError("perplexity needs a sequence of at least two tokens")
    total, count = 0.0, 0
    for start in range(0, len(usable), batch_size):
        rows = usable[start : start + batch_size]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        losses = next_token_loss(logits(model, ids, mask), ids, mask)
        total += losses.double().sum().item()
        count += losses.numel()
    return Perplexity(math.exp(min(total / count, 700.0)), total / count, count)
