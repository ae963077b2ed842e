"""Move a loaded model's memory without touching its module tree.

`.to()` breaks int8 modules and raises for quantised transformers models, so the tensors are swapped one by one:
weights, buffers, and bitsandbytes' scales and tables. Paths, hooks and attached lenses stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from services.residency.lenses import Lens

_WORD = 8
"""Bytes that are summed up as one number."""


class Damaged(RuntimeError):
    """What comes back from host memory has other bytes than what went there."""


Convert = Callable[[Tensor], Tensor]


def sums(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Sums modulo 2^64 of each tensor's bytes, computed where it is: one byte that changes changes one of them."""
    return tuple(number for tensor in tensors for number in _sums(tensor))


def _sums(tensor: Tensor) -> tuple[int, int]:
    found = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if found.storage_offset() % _WORD:
        found = found.clone()
    words = found.numel() // _WORD * _WORD
    return int(found[:words].view(torch.int64).sum()), int(found[words:].sum(dtype=torch.int64))


def move(model: nn.Module, lenses: Sequence[Lens], origin: str, target: str) -> None:
    """Bring a model and its lenses from one torch device to another; all of them or, where one raises, none."""
    try:
        for lens in lenses:
            lens.move(target)
        relocate(model, lambda tensor: tensor.to(target))
    except BaseException:
        for lens in lenses:
            lens.move(origin)
        raise


def stow(lens: Lens, origin: str) -> None:
    """Take a lens off and bring it to host memory from a torch device; where that fails, it is attached as before."""
    lens.detach()
    try:
        lens.move("cpu")
    except BaseException:
        fetch(lens, origin)
        raise


def fetch(lens: Lens, target: str) -> None:
    """Bring a lens from host memory to a torch device and attach it; where that fails, it is as before."""
    try:
        lens.move(target)
    except BaseException:
        lens.move("cpu")
        raise
    lens.attach()


def relocate(model: nn.Module, convert: Convert) -> None:
    """Replace the memory of every tensor by what `convert` makes of it; tensors that share memory still do afterwards.

    Where `convert` raises, for want of memory say, every tensor is as before.

    Args:
        model: quantised or not.
        convert: gives a tensor of the same shape, dtype and bits elsewhere, for example `lambda t: t.to("cpu")`.
    """
    moved: dict[tuple[int, int, torch.Size], tuple[Tensor, Tensor]] = {}
    replacements: list[Callable[[], None]] = []
    done: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if key not in moved:
            # The original stays alive, so that no new tensor is given its address and taken for it.
            moved[key] = (tensor, convert(tensor.detach()))
        return moved[key][1]

    for module in model.modules():
        replacements += [partial(setattr, holder, name, once(tensor)) for holder, name, tensor in _quantized(module)]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in done:
                done.add(id(parameter))
                replacements.append(partial(setattr, parameter, "data", once(parameter.data)))
        for name, buffer in module.named_buffers(recurse=False):
            replacements.append(partial(module._buffers.__setitem__, name, once(buffer)))
    for replace in replacements:
        replace()


def _quantized(module: nn.Module) -> Iterator[tuple[object, str, Tensor]]:
    """Holder, attribute and tensor of what bitsandbytes keeps beside parameters and buffers."""
    weight, state = getattr(module, "weight", None), getattr(module, "state", None)
    for holder in (weight, state):
        for name in ("CB", "SCB"):
            tensor = getattr(holder, name, None)
            if isinstance(tensor, Tensor):
                yield holder, name, tensor
    quant_state = getattr(weight, "quant_state", None)
    while quant_state is not None:
        for name, value in vars(quant_state).items():
            if isinstance(value, Tensor):
                yield quant_state, name, value
        quant_state = getattr(quant_state, "state2", None)
