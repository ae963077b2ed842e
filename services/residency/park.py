"""Move a loaded model's memory without touching its module tree.

`.to()` breaks int8 modules and raises for quantised transformers models, so the tensors are swapped one by one:
weights, buffers, and bitsandbytes' scales and tables. Paths, hooks and attached lenses stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Convert = Callable[[Tensor], Tensor]


def relocate(model: nn.Module, convert: Convert) -> None:
    """Replace the memory of every tensor by what `convert` makes of it; tensors that share memory still do afterwards.

    Args:
        model: quantised or not.
        convert: gives a tensor of the same shape, dtype and bits elsewhere, for example `lambda t: t.to("cpu")`.
    """
    moved: dict[tuple[int, int, torch.Size], tuple[Tensor, Tensor]] = {}
    done: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if key not in moved:
            # The original stays alive, so that no new tensor is given its address and taken for it.
            moved[key] = (tensor, convert(tensor.detach()))
        return moved[key][1]

    for module in model.modules():
        _relocate_quantized(module, once)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in done:
                done.add(id(parameter))
                parameter.data = once(parameter.data)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = once(buffer)


def _relocate_quantized(module: nn.Module, once: Convert) -> None:
    weight, state = getattr(module, "weight", None), getattr(module, "state", None)
    for holder in (weight, state):
        for name in ("CB", "SCB"):
            tensor = getattr(holder, name, None)
            if isinstance(tensor, Tensor):
                setattr(holder, name, once(tensor))
    quant_state = getattr(weight, "quant_state", None)
    while quant_state is not None:
        for name, value in vars(quant_state).items():
            if isinstance(value, Tensor):
                setattr(quant_state, name, once(value))
        quant_state = getattr(quant_state, "state2", None)
