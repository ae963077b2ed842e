"""Exact parameter counts of extensions from the model's shapes; no weight is read.

The base's own count comes from its checkpoint's headers (`services.residency.estimate.parameter_count`). Published
ratios use two denominators (PEFT prints the second), so both are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from services.residency.loading import skeleton


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How large an extension is beside its base."""

    base: int
    """Distinct parameters of the base."""
    lora: int
    """Parameters of the adapters."""
    layer: int
    """Parameters of inserted layers."""
    shared: int = 0
    """Of these, in layers of another extension that training leaves alone."""
    trains_base: bool = False
    """Training changes the base's parameters too, of a copy."""

    @property
    def trainable(self) -> int:
        """Parameters that training changes; the base's too where it is a copy that becomes a new model."""
        return self.lora + self.layer - self.shared + (self.base if self.trains_base else 0)

    @property
    def trainable_over_base(self) -> float:
        """Trainable parameters as a share of the base alone."""
        return self.trainable / self.base

    @property
    def trainable_over_total(self) -> float:
        """Trainable parameters as a share of base and extension together, what PEFT prints."""
        return self.trainable / (self.base + self.lora + self.layer)

    def as_dict(self) -> dict[str, float]:
        """All seven figures by name."""
        names = ("base", "trainable", "lora", "layer", "shared", "trainable_over_base", "trainable_over_total")
        return {name: getattr(self, name) for name in names}


def lora_parameters(targets: Mapping[str, tuple[int, int]], r: int, variant: str = "lora") -> int:
    """Trainable parameters of an adapter: A [r, in] and B [out, r] per module.

    Args:
        targets: adapted modules with their (in_features, out_features).
        r: rank.
        variant: DoRA has a magnitude [out] per module too, AdaLoRA r singular values.
    """
    extra = {"dora": lambda n_out: n_out, "adalora": lambda _: r}.get(variant, lambda _: 0)
    return sum(r * (n_in + n_out) + extra(n_out) for n_in, n_out in targets.values())


def distinct_parameters(model: nn.Module) -> int:
    """Parameters of a module in memory or on the meta device, shared ones counted once; not for packed int4 weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def skeleton_of(values: Mapping[str, object]) -> PreTrainedModel:
    """The model of a config on the meta device: every shape, no memory for parameters.

    Args:
        values: a Hugging Face config's JSON with `model_type`, whole numbers possibly as floats.

    Raises:
        KeyError: transformers does not know the model type.
        LoadFailed: no model can be made of the config.
    """
    fields_given = dict(values)
    config_class = CONFIG_MAPPING[str(fields_given.pop("model_type"))]
    return skeleton(config_class(**_typed(config_class, fields_given)), torch.float32)


def _typed(config_class: type[PretrainedConfig], values: Mapping[str, object]) -> dict[str, object]:
    """Whole numbers as the type their field wants: protobuf made floats of all of them, and transformers is strict."""
    hints = {field.name: field.type for field in fields(config_class)}
    return {name: value if _accepts_only_float(hints.get(name)) else _whole(value) for name, value in values.items()}


def _accepts_only_float(hint: object) -> bool:
    accepted = get_args(hint) or (hint,)
    return float in accepted and int not in accepted


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _whole(item) for name, item in value.items()}
    return value
