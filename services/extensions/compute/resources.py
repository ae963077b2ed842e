"""Where a base runs best, and in which numbers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from services.residency.park import relocate
from services.residency.quantize import is_quantized

OVERFLOWS_IN_FP16 = frozenset({"t5", "mt5", "umt5", "longt5"})
"""Model types whose activations exceed what float16 can hold (transformers#14189, #4287)."""


def automatic_device() -> str:
    """The first GPU, or the CPU where there is none."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def automatic_dtype(model_type: str, device: str) -> torch.dtype:
    """float16 on a GPU, where T5 gets bfloat16 if the GPU has it and float32 if not; float32 on a CPU.

    Args:
        model_type: of the model's config.
        device: torch device.
    """
    if not device.startswith("cuda"):
        return torch.float32
    if model_type not in OVERFLOWS_IN_FP16:
        return torch.float16
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Bring a bare base to a device, in the dtype that suits it there; a quantised one keeps its numbers.

    Args:
        model: moved in place.
        device: torch device, or `auto` for the best one there is.
    """
    device = automatic_device() if device == "auto" else device
    if is_quantized(model):
        relocate(model, lambda tensor: tensor.to(device))
        return model
    dtype = automatic_dtype(model.config.model_type, device)
    if model.dtype != dtype:
        model.to(dtype)
    return model.to(device)
