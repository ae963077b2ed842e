"""What each kind of extension is made of: its counts, and the weights it begins with.

A new kind is one class and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.extensions.compute.count import ParameterCounts, lora_parameters
from services.residency.lenses import lora
from services.residency.lenses.extension import Extension, ExtensionRefused, applied
from services.residency.lenses.inserted import insert

Operations = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a new extension consists of."""

    operations: Operations
    """What to do to the base, in order."""
    weights: Mapping[str, torch.Tensor]
    """CPU tensors by checkpoint key; without those of layers that it shares."""
    adapter: LoraConfig | None
    """PEFT's configuration of the adapter, if it has one."""


class Kind(Protocol):
    """One kind of extension. `shared` are the insertions of the extension whose layers it uses, if it does."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """Whether `draft` reads the base's weights, or its shapes alone."""

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """What will be done to the base, in order; `model` is the bare base, or its skeleton.

        Layers that training inserts later are not among them.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """Exact counts, layers that training inserts later included.

        Args:
            model: the bare base, or its skeleton.
            config: what the extension is made of.
            base: the base's own count.
            shared: see the class.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """A new extension for the bare base, or for its skeleton where that is enough.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """


class LoraKind:
    """Adapters on the base's linear modules."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """DoRA's magnitudes begin as the norms of the base's weights."""
        return config.lora_variant == "dora"

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """Adapt every target."""
        del model
        _require_none_shared(config, shared)
        return ({"op": "lora"},)

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """A, B, and what the variant adds."""
        _require_none_shared(config, shared)
        return ParameterCounts(base, _adapters(model, config), layer=0, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """It changes nothing until it is trained."""
        operations = self.operations(model, config, shared)
        return Draft(operations, *_fresh_adapters(model, config, seed))


class LayerKind:
    """Layers inserted into the base's stacks."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """A layer begins as a copy of its neighbour."""
        del config
        return True

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """One insertion for every layer that is there from the beginning."""
        _require_none_shared(config, shared)
        return _inserted(model, config, later=False).operations

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """Every parameter of the inserted layers."""
        _require_none_shared(config, shared)
        layer = _size(_inserted(model, config, later=True))
        return ParameterCounts(base, lora=0, layer=layer, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """Scaled copies of the layers before; nothing in them is random."""
        del seed
        _require_none_shared(config, shared)
        _inserted(model, config, later=True)  # what cannot be inserted later is refused now
        inserted = _inserted(model, config, later=False)
        return Draft(inserted.operations, inserted.state(), adapter=None)


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
            adapters = _adapters(model, config)
        layer = _size(self._layers(model, config, shared, later=True))
        frozen = layer if shared and not config.train_shared_layer else 0
        return ParameterCounts(base, adapters, layer, shared=frozen, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """Insertion first, since PEFT freezes what it finds; then adapters on everything."""
        self._layers(model, config, shared, later=True)  # what cannot be inserted later is refused now
        inserted = self._layers(model, config, shared, later=False)
        with applied(inserted.edits):
            weights, adapter = _fresh_adapters(model, config, seed)
        own: Mapping[str, torch.Tensor] = {} if shared else inserted.state()
        return Draft((*inserted.operations, {"op": "lora"}), {**own, **weights}, adapter)

    def _layers(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations, *, later: bool) -> Extension:
        if bool(config.shared_layer_of) != bool(shared):
            raise ExtensionRefused("shared_layer_of", "names no extension with inserted layers")
        return _again(model, shared) if shared else _inserted(model, config, later=later)


KINDS: dict[str, Kind] = {"lora": LoraKind(), "layer": LayerKind(), "hybrid": HybridKind()}
"""Every kind by its name in manifests and requests."""


def _require_none_shared(config: ExtensionConfig, shared: Sequence[Mapping[str, Any]]) -> None:
    if config.shared_layer_of or shared:
        raise ExtensionRefused("shared_layer_of", "belongs to an extension of kind hybrid")


def _targets(model: PreTrainedModel, config: ExtensionConfig) -> dict[str, tuple[int, int]]:
    targets = lora.matched(lora.adaptable(model), config.targets(model))
    lora.require_rank(targets, config.lora_r)
    return targets


def _adapters(model: PreTrainedModel, config: ExtensionConfig) -> int:
    return lora_parameters(_targets(model, config), config.lora_r, config.lora_variant)


def _fresh_adapters(
    model: PreTrainedModel, config: ExtensionConfig, seed: int
) -> tuple[Mapping[str, torch.Tensor], LoraConfig]:
    adapter = config.peft(model)
    fresh = lora.fresh_triplets if config.lora_variant == "adalora" else lora.fresh_weights
    weights: Mapping[str, torch.Tensor] = fresh(_targets(model, config), config.lora_r, seed)
    if config.lora_variant == "dora":
        weights = lora.build(model, adapter, weights, fresh=True).state()
    return weights, adapter


def _size(extension: Extension) -> int:
    return sum(parameter.numel() for parameter in extension.parameters.values())


def _inserted(model: PreTrainedModel, config: ExtensionConfig, *, later: bool) -> Extension:
    """The configured layers; with those that training inserts, if `later`."""
    whole = Extension(edits=(), parameters={})
    for placement in config.placements:
        if later or placement.from_step == 0:
            whole = add(model, whole, placement)
    return whole


def add(model: PreTrainedModel, whole: Extension, placement: LayerPlacement) -> Extension:
    """An extension with one more layer, or one more in each stack, for a bare base.

    Raises:
        ExtensionRefused: it does not fit, or lies below a layer that was inserted into the stack before.
    """
    for position in _positions(model, placement):
        with applied(whole.edits):
            part = insert(
                model,
                position,
                index=placement.index,
                scale=placement.initialization_scale,
                mlp_width=placement.mlp_width,
            )
        index = part.operations[0]["index"]
        below = [op["index"] for op in whole.operations if op.get("position") == position and op["index"] >= index]
        if below:
            raise ExtensionRefused(
                "layers.index", f"must be above {max(below)}: layers go into the {position} upwards, got {index}"
            )
        whole = whole.then(part)
    return whole


def _again(model: PreTrainedModel, insertions: Operations) -> Extension:
    """The shapes of another extension's layers."""
    whole = Extension(edits=(), parameters={})
    for operation in insertions:
        placement = LayerPlacement(
            position=operation["position"], index=operation["index"], mlp_width=operation.get("mlp_width")
        )
        whole = add(model, whole, placement)
    return replace(whole, operations=tuple(dict(operation) for operation in insertions))


def _positions(model: PreTrainedModel, placement: LayerPlacement) -> tuple[str, ...]:
    """Stacks to insert into; the encoder of a model that has none is its only stack (spec/004's default)."""
    if model.config.is_encoder_decoder:
        return ("encoder", "decoder") if placement.position == "both" else (placement.position,)
    if placement.position == "both":
        raise ExtensionRefused("layer.position", "this model has one stack only")
    return ("decoder",)
