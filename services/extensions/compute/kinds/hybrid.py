"""Inserted layers and adapters together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.extensions.compute.count import ParameterCounts
from services.extensions.compute.kinds.kind import Draft, Operations
from services.extensions.compute.kinds.layer import add, inserted_layers, layers_size
from services.extensions.compute.kinds.lora import LoraKind, adapters_size, fresh_adapters
from services.residency.lenses.extension import Extension, ExtensionRefused, applied


class HybridKind:
    """Inserted layers, its own or another extension's, and adapters on the base and on them."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """As for the layer alone; over shared layers as for the adapters alone."""
        return not config.shared_layer_of or LoraKind().needs_base(config)

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """Insert, then adapt."""
        return (*self._layers(model, config, shared, later=False).operations, {"op": "lora"})

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """Layers, and adapters on the model as it is before training inserts more."""
        with applied(self._layers(model, config, shared, later=False).edits):
            adapters = adapters_size(model, config)
        layer = layers_size(self._layers(model, config, shared, later=True))
        frozen = layer if shared and not config.train_shared_layer else 0
        return ParameterCounts(base, adapters, layer, shared=frozen, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """Insertion first, since PEFT freezes what it finds; then adapters on everything."""
        self._layers(model, config, shared, later=True)  # what cannot be inserted later is refused now
        inserted = self._layers(model, config, shared, later=False)
        with applied(inserted.edits):
            weights, adapter = fresh_adapters(model, config, seed)
        own: Mapping[str, torch.Tensor] = {} if shared else inserted.state()
        return Draft((*inserted.operations, {"op": "lora"}), {**own, **weights}, adapter)

    def _layers(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations, *, later: bool) -> Extension:
        if bool(config.shared_layer_of) != bool(shared):
            raise ExtensionRefused("shared_layer_of", "names no extension with inserted layers")
        return _again(model, shared) if shared else inserted_layers(model, config, later=later)


def _again(model: PreTrainedModel, insertions: Operations) -> Extension:
    """The shapes of another extension's layers."""
    whole = Extension(edits=(), parameters={})
    for operation in insertions:
        placement = LayerPlacement(
            position=operation["position"], index=operation["index"], mlp_width=operation.get("mlp_width")
        )
        whole = add(model, whole, placement)
    return replace(whole, operations=tuple(dict(operation) for operation in insertions))
