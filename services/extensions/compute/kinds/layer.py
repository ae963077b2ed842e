"""Inserted layers alone."""

from __future__ import annotations

from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.extensions.compute.count import ParameterCounts
from services.extensions.compute.kinds.kind import Draft, Operations, require_none_shared
from services.residency.lenses.extension import Extension, ExtensionRefused, applied
from services.residency.lenses.inserted import insert


class LayerKind:
    """Layers inserted into the base's stacks."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """A layer begins as a copy of its neighbour."""
        del config
        return True

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """One insertion for every layer that is there from the beginning."""
        require_none_shared(config, shared)
        return inserted_layers(model, config, later=False).operations

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """Every parameter of the inserted layers."""
        require_none_shared(config, shared)
        layer = layers_size(inserted_layers(model, config, later=True))
        return ParameterCounts(base, lora=0, layer=layer, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """Scaled copies of the layers before; nothing in them is random."""
        del seed
        require_none_shared(config, shared)
        inserted_layers(model, config, later=True)  # what cannot be inserted later is refused now
        inserted = inserted_layers(model, config, later=False)
        return Draft(inserted.operations, inserted.state(), adapter=None)


def layers_size(extension: Extension) -> int:
    """Parameters of inserted layers."""
    return sum(parameter.numel() for parameter in extension.parameters.values())


def inserted_layers(model: PreTrainedModel, config: ExtensionConfig, *, later: bool) -> Extension:
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


def _positions(model: PreTrainedModel, placement: LayerPlacement) -> tuple[str, ...]:
    """Stacks to insert into; the encoder of a model that has none is its only stack (spec/004's default)."""
    if model.config.is_encoder_decoder:
        return ("encoder", "decoder") if placement.position == "both" else (placement.position,)
    if placement.position == "both":
        raise ExtensionRefused("layer.position", "this model has one stack only")
    return ("decoder",)
