"""Bytes that a load will take, from the config and the files' headers; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from services.residency.checkpoint import Entry
from services.residency.families import Facts, facts
from services.residency.loading import assign_names, skeleton, stored_dtype, target_dtypes
from services.residency.quantize import CAST, linear_modules, state_bytes, weight_bytes

TOKENS = 1024
"""Tokens per sequence that activations are reckoned with, where the context is not shorter."""
DEVICE_CONTEXT = 256 * 1024 * 1024
"""What a model's first forward adds on a GPU beside tensors: library workspaces and kernels."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by cause."""

    weights: int
    """Parameters and buffers, quantised where they will be."""
    quantization_state: int
    """Scales and tables of the quantised modules."""
    activations: int
    """Peak of one forward of the configured batch up to the last block, without logits."""
    overhead: int
    """The largest tensor a second time while it is converted; on a GPU also the library's workspaces."""

    @property
    def required(self) -> int:
        """Bytes in all."""
        return self.weights + self.quantization_state + self.activations + self.overhead

    @property
    def resident(self) -> int:
        """Bytes that stay between forward passes."""
        return self.weights + self.quantization_state


def parameter_count(model: PreTrainedModel, entries: Sequence[Entry]) -> int:
    """Parameters, tied ones once unless the file stores them apart (T5's head, whatever its config says)."""
    return sum(numel for _, numel in _parameters(model, entries))


def _parameters(model: PreTrainedModel, entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """(name, elements) of every parameter that will have memory of its own."""
    assigned = assign_names(model, list(entries))
    tied = model.all_tied_weights_keys
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = assigned.get(name)
        found.setdefault((tied.get(name, name), entry.name if entry else ""), (name, parameter.numel()))
    stored = {shared for shared, entry in found if entry}
    return [value for (shared, entry), value in found.items() if entry or shared not in stored]


def activation_bytes(known: Facts, itemsize: int, batch_size: int, tokens: int = TOKENS) -> int:
    """Residual stream, its normed copy and the MLP's three intermediates of one block, for a whole batch."""
    rows = batch_size * min(tokens, known.context_length)
    return rows * (2 * known.hidden_size + 3 * known.intermediate_size) * itemsize


def estimate(config: PretrainedConfig, entries: Sequence[Entry], quantization: str, device: str) -> Estimate:
    """What a load will take, for `laid_out` without its model.

    `entries` may be empty where only the config is known.

    Raises:
        UnsupportedModel, LoadFailed: the model cannot be loaded at all.
    """
    dtype = CAST.get(quantization) or (stored_dtype(list(entries)) if entries else config.dtype or torch.float32)
    return laid_out(skeleton(config, dtype), entries, quantization, dtype, device)


def laid_out(
    model: PreTrainedModel, entries: Sequence[Entry], quantization: str, dtype: torch.dtype, device: str
) -> Estimate:
    """What it will take to fill a model that is laid out on the meta device.

    Args:
        model: not quantised yet.
        entries: tensors of its files by their headers.
        quantization: one of `quantize.QUANTIZATIONS`.
        dtype: of what is not quantised.
        device: torch device.

    Raises:
        LoadFailed: a shape in the files is not the config's.
    """
    sizes = [found for _, *found in tensor_bytes(model, entries, quantization, dtype, device)]
    known = facts(model.config.to_dict())
    converted = quantization != "none"
    return Estimate(
        weights=sum(weights for weights, _ in sizes),
        quantization_state=sum(state for _, state in sizes),
        activations=activation_bytes(known, dtype.itemsize, known.model_batch_size),
        overhead=(max((entry.nbytes for entry in entries), default=0) if converted else 0)
        + (DEVICE_CONTEXT if device.startswith("cuda") else 0),
    )


def tensor_bytes(
    model: PreTrainedModel, entries: Sequence[Entry], quantization: str, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and bytes of quantization state of every buffer and parameter with memory of its own.

    Arguments and errors are those of `laid_out`.
    """
    for name, buffer in model.named_buffers():
        yield name, buffer.numel() * buffer.element_size(), 0
    linear = linear_modules(model) if quantization in ("int8", "int4") else {}
    dtype_of = target_dtypes(model, dtype)
    for name, numel in _parameters(model, entries):
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in linear:
            state = state_bytes(quantization, *_features(linear[path]), device)
            yield name, weight_bytes(quantization, numel), state
        else:
            yield name, numel * dtype_of(name).itemsize, 0


def _features(module: nn.Module) -> tuple[int, int]:
    shape = module.weight.shape
    return (shape[0], shape[1]) if isinstance(module, nn.Linear) else (shape[1], shape[0])
