"""A digest of what a model computes on a fixed input: the same bits before and after every move, attach and detach."""

from __future__ import annotations

import torch
from blake3 import blake3
from torch import Tensor, nn

LENGTH = 32


def fixed_input(vocab_size: int, context_length: int) -> Tensor:
    """Token ids [1, S], S up to 32, the same for every model of that vocabulary; they step through all of it."""
    steps = torch.arange(min(LENGTH, context_length), dtype=torch.int64)
    return ((steps * 7919 + 17) % vocab_size).unsqueeze(0)


def fingerprint(model: nn.Module) -> str:
    """Hex blake3 of the logits of `fixed_input` in the model's own dtype; comparable on one kind of device only."""
    config = model.config
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LENGTH
    ids = fixed_input(config.vocab_size, context).to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "use_cache": False}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        scores = model(**inputs).logits
    return blake3(scores.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
