"""Exact parameter counts of extensions, without weights: from a checkpoint's safetensors headers and the model's shape.

A parameter that several modules share counts once. Published ratios use two denominators (PEFT prints the second), so
both are given.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How large an extension is beside its base."""

    base: int
    """Distinct parameters of the base."""
    lora: int
    """Parameters of the adapters."""
    layer: int
    """Parameters of inserted layers."""

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        return self.lora + self.layer

    @property
    def trainable_over_base(self) -> float:
        """Trainable parameters as a share of the base alone."""
        return self.trainable / self.base

    @property
    def trainable_over_total(self) -> float:
        """Trainable parameters as a share of base and extension together, what PEFT prints."""
        return self.trainable / (self.base + self.trainable)

    def as_dict(self) -> dict[str, float]:
        """All six figures by name."""
        names = ("base", "trainable", "lora", "layer", "trainable_over_base", "trainable_over_total")
        return {name: getattr(self, name) for name in names}


def lora_parameters(targets: Mapping[str, tuple[int, int]], r: int, *, dora: bool = False) -> int:
    """Parameters of an adapter: A [r, in] and B [out, r] per module, for DoRA a magnitude [out] too.

    Args:
        targets: adapted modules with their (in_features, out_features).
        r: rank.
        dora: count DoRA's magnitudes.
    """
    return sum(r * (n_in + n_out) + (n_out if dora else 0) for n_in, n_out in targets.values())


def distinct_parameters(model: nn.Module) -> int:
    """Parameters of a module in memory or on the meta device, shared ones counted once; not for packed int4 weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def skeleton(config: Mapping[str, object] | PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: every shape, no memory.

    Args:
        config: a Hugging Face config, or its JSON with `model_type`.
    """
    if not isinstance(config, PretrainedConfig):
        values = dict(config)
        config = AutoConfig.for_model(str(values.pop("model_type")), **values)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def checkpoint_parameters(files: Iterable[Path], model: PreTrainedModel) -> int:
    """Parameters of a checkpoint by its safetensors headers; no weights are read but a doubtful head's.

    The config alone cannot tell whether the head is a tensor of its own: transformers ties T5's whatever the config
    says, unless the file holds a different one. Tensors that are no parameters of the model (GPT-2's old causal masks)
    and further names of a shared embedding do not count.

    Args:
        files: all shards of the checkpoint.
        model: the model's skeleton.

    Raises:
        ValueError: a file is no safetensors file.
    """
    stored: dict[str, _Stored] = {}
    for file in files:
        stored |= _header(file)
    head = _head_key(model)
    owners: dict[int, _Stored] = {}
    total = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = stored.get(name) or stored.get(name.removeprefix(f"{model.base_model_prefix}."))
        if tensor is None:
            continue
        owner = owners.setdefault(id(parameter), tensor)
        if owner is tensor or (name == head and not _same_bytes(owner, tensor)):
            total += tensor.numel
    return total


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies in a file."""

    file: Path
    start: int
    end: int
    numel: int


def _head_key(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((f"{path}.weight" for path, module in model.named_modules() if module is head), "")


def _header(path: Path) -> dict[str, _Stored]:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > _MAX_HEADER:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Stored(path, *(8 + length + offset for offset in entry["data_offsets"]), prod(entry["shape"]))
        for name, entry in header.items()
    }


def _same_bytes(left: _Stored, right: _Stored) -> bool:
    remaining = left.end - left.start
    if remaining != right.end - right.start:
        return False
    with left.file.open("rb") as one, right.file.open("rb") as other:
        one.seek(left.start)
        other.seek(right.start)
        while remaining > 0:
            size = min(remaining, 1 << 20)
            if one.read(size) != other.read(size):
                return False
            remaining -= size
    return True
