"""What each kind of extension is made of: its counts, and the weights it begins with.

A new kind is one class and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts, lora_parameters
from services.residency.lenses import lora
from services.residency.lenses.extension import Extension, ExtensionRefused, applied
from services.residency.lenses.inserted import insert


@dataclass(frozen=True, slots=True)
class Draft:
    """What a new extension consists of."""

    operations: tuple[dict[str, Any], ...]
    """What to do to the base, in order."""
    weights: Mapping[str, torch.Tensor]
    """CPU tensors by checkpoint key."""
    adapter: LoraConfig | None
    """PEFT's configuration of the adapter, if it has one."""


class Kind(Protocol):
    """One kind of extension."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """Whether `draft` reads the base's weights, or its shapes alone."""

    def operations(self, model: PreTrainedModel, config: ExtensionConfig) -> tuple[dict[str, Any], ...]:
        """What will be done to the base, in order; `model` is the bare base, or its skeleton.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """Exact counts.

        Args:
            model: the bare base, or its skeleton.
            config: what the extension is made of.
            base: the base's own count.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """A new extension for the bare base, or for its skeleton where that is enough.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """


class LoraKind:
    """Adapters on the base's linear modules."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """DoRA's magnitudes begin as the norms of the base's weights."""
        return config.lora_variant == "dora"

    def operations(self, model: PreTrainedModel, config: ExtensionConfig) -> tuple[dict[str, Any], ...]:
        """Adapt every target."""
        del model, config
        return ({"op": "lora"},)

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """A, B, and DoRA's magnitudes."""
        dora = config.lora_variant == "dora"
        return ParameterCounts(base, lora=lora_parameters(_targets(model, config), config.lora_r, dora=dora), layer=0)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """A random, B zero: it changes nothing until it is trained."""
        adapter = config.peft(model)
        weights: Mapping[str, torch.Tensor] = lora.fresh_weights(_targets(model, config), config.lora_r, seed)
        if self.needs_base(config):
            weights = lora.build(model, adapter, weights, fresh=True).state()
        return Draft(operations=self.operations(model, config), weights=weights, adapter=adapter)


class LayerKind:
    """A layer inserted into one stack, or one into each."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """The layer begins as a copy of its neighbour."""
        del config
        return True

    def operations(self, model: PreTrainedModel, config: ExtensionConfig) -> tuple[dict[str, Any], ...]:
        """Insert one layer, or one in each stack."""
        return _inserted(model, config)[0]

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """Every parameter of the inserted layers."""
        _, inserted = _inserted(model, config)
        return ParameterCounts(base, lora=0, layer=sum(p.numel() for p in inserted.parameters.values()))

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """A scaled copy of the layer before; nothing in it is random."""
        del seed
        operations, inserted = _inserted(model, config)
        return Draft(operations=operations, weights=inserted.state(), adapter=None)


class HybridKind:
    """Inserted layers, and adapters on the base and on them."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """As for the layer alone."""
        del config
        return True

    def operations(self, model: PreTrainedModel, config: ExtensionConfig) -> tuple[dict[str, Any], ...]:
        """Insert, then adapt."""
        return LayerKind().operations(model, config) + LoraKind().operations(model, config)

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """Layers, and adapters on the longer model."""
        _, inserted = _inserted(model, config)
        with applied(inserted.edits):
            lora_count = LoraKind().counts(model, config, base).lora
        return ParameterCounts(base, lora_count, LayerKind().counts(model, config, base).layer)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """Insertion first, since PEFT freezes what it finds; then adapters on everything."""
        operations, inserted = _inserted(model, config)
        with applied(inserted.edits):
            adapters = LoraKind().draft(model, config, seed)
        return Draft(
            operations=operations + adapters.operations,
            weights={**inserted.state(), **adapters.weights},
            adapter=adapters.adapter,
        )


KINDS: dict[str, Kind] = {"lora": LoraKind(), "layer": LayerKind(), "hybrid": HybridKind()}
"""Every kind by its name in manifests and requests."""


def _targets(model: PreTrainedModel, config: ExtensionConfig) -> dict[str, tuple[int, int]]:
    targets = lora.matched(lora.adaptable(model), config.targets(model))
    lora.require_rank(targets, config.lora_r)
    return targets


def _inserted(model: PreTrainedModel, config: ExtensionConfig) -> tuple[tuple[dict[str, Any], ...], Extension]:
    """The operations of the configured layers, and the layers."""
    operations: list[dict[str, Any]] = []
    whole = Extension(edits=(), parameters={})
    for position in _positions(model, config):
        with applied(whole.edits):
            part = insert(model, position, index=config.layer_index, scale=config.layer_initialization_scale)
        number = int(next(iter(part.parameters)).split(".")[2])
        operations.append({"op": "insert", "position": position, "index": number})
        whole = whole.then(part)
    return tuple(operations), whole


def _positions(model: PreTrainedModel, config: ExtensionConfig) -> tuple[str, ...]:
    """Stacks to insert into; the encoder of a model that has none is its only stack (spec/004's default)."""
    if model.config.is_encoder_decoder:
        return ("encoder", "decoder") if config.layer_position == "both" else (config.layer_position,)
    if config.layer_position == "both":
        raise ExtensionRefused("layer.position", "this model has one stack only")
    return ("decoder",)
