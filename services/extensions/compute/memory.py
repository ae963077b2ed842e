"""How many bytes of its device a training needs beside the base's weights: what the ledger is asked for."""

from __future__ import annotations

from transformers import PretrainedConfig

from services.extensions.compute.examples import Examples
from services.extensions.compute.settings import TrainSettings
from services.residency.lenses.extension import Extension

MOMENTS = 2
"""AdamW's, float32 each, as the gradient is that they are made of."""
WIDTHS_PER_LAYER = 34
"""Activations that autograd keeps per layer and token, in widths: attention 11, MLP 19, norms 4 (Korthikanti et al.,
arXiv:2205.05198, section 4.1, counted in elements of a 2-byte format)."""


def training_bytes(config: PretrainedConfig, extension: Extension, examples: Examples, settings: TrainSettings) -> int:
    """Weights, masters, gradients and moments of the extension, and the activations of one forward pass.

    Args:
        config: the base's.
        extension: what is trained.
        examples: what it is trained on; their lengths count.
        settings: how; a layer that is computed again keeps its input alone, and one layer at a time the rest.
    """
    batch, source = min(settings.batch_size, len(examples)), examples.ids.shape[1]
    target = examples.labels.shape[1] if config.is_encoder_decoder else source
    stacks = [(config.num_hidden_layers, source)]
    if config.is_encoder_decoder:
        stacks.append((config.num_decoder_layers, target))
    size = 4 if settings.precision == "fp32" else 2
    kept = sum(_stack_elements(config, layers, batch, length, settings) for layers, length in stacks)
    logits = 3 * batch * target * config.vocab_size
    return extension.nbytes + _state_bytes(extension) + size * kept + 4 * logits


def _state_bytes(extension: Extension) -> int:
    numbers = sum(parameter.numel() for parameter in extension.parameters.values())
    masters = sum(p.numel() for p in extension.parameters.values() if p.element_size() < 4)
    return 4 * (numbers * (1 + MOMENTS) + masters)


def _stack_elements(config: PretrainedConfig, layers: int, batch: int, length: int, settings: TrainSettings) -> int:
    """Numbers that the backward pass of a stack keeps."""
    hidden = batch * length * config.hidden_size
    layer = config.num_attention_heads * batch * length * length + hidden * WIDTHS_PER_LAYER // 2
    return layers * hidden + layer if settings.gradient_checkpointing else layers * layer
