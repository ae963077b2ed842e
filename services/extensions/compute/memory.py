"""How many bytes of its device a training needs beside the base's weights: what the ledger is asked for."""

from __future__ import annotations

from transformers import PretrainedConfig

from services.residency.lenses.extension import Extension

OPTIMIZER_COPIES = 3
"""Tensors of an extension's own size beside its weights: the gradient and AdamW's two moments."""
WIDTHS_PER_LAYER = 34
"""Activations that autograd keeps per layer and token, in widths: attention 11, MLP 19, norms 4 (Korthikanti et al.,
arXiv:2205.05198, section 4.1, counted in elements of a 2-byte format)."""


def training_bytes(config: PretrainedConfig, extension: Extension, batch: int, length: int) -> int:
    """Weights, gradients and moments of the extension, and the activations of one step in 4-byte numbers.

    Args:
        config: the base's.
        extension: what is trained.
        batch: rows of a step.
        length: tokens of a row.
    """
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    tokens = batch * length
    attention = layers * heads * batch * length * length
    hidden = layers * tokens * width * WIDTHS_PER_LAYER // 2
    logits = 3 * tokens * config.vocab_size
    return extension.nbytes * (1 + OPTIMIZER_COPIES) + 4 * (attention + hidden + logits)
