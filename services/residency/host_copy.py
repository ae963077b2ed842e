"""A model's copy in the host's memory, made without allocating anything on its device."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

from torch import Tensor, nn


def device_bound(model: nn.Module) -> str:
    """The format of weights that only their device can compute with (a kernel's own tensor class); else empty."""
    kinds = {type(tensor) for tensor in chain(model.parameters(), model.buffers())}
    return ", ".join(sorted(kind.__name__ for kind in kinds - {nn.Parameter, Tensor}))


def host_copy(model: nn.Module) -> nn.Module:
    """The same model on the CPU, in the same number formats; weights that are shared stay shared."""
    copies: dict[int, Tensor] = {}
    for tensor in model.parameters():
        copies[id(tensor)] = nn.Parameter(tensor.detach().to("cpu", copy=True), requires_grad=False)
    for tensor in model.buffers():
        copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return deepcopy(model, copies)
