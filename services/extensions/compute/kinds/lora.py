"""Adapters alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts, lora_parameters
from services.extensions.compute.kinds.kind import Draft, Operations, require_none_shared
from services.residency.lenses import lora


class LoraKind:
    """Adapters on the base's linear modules."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """DoRA's magnitudes begin as the norms of the base's weights."""
        return config.lora_variant == "dora"

    def operations(self, model: PreTrainedModel, config: ExtensionConfig, shared: Operations = ()) -> Operations:
        """Adapt every target."""
        del model
        require_none_shared(config, shared)
        return ({"op": "lora"},)

    def counts(
        self, model: PreTrainedModel, config: ExtensionConfig, base: int, shared: Operations = ()
    ) -> ParameterCounts:
        """A, B, and what the variant adds."""
        require_none_shared(config, shared)
        return ParameterCounts(base, adapters_size(model, config), layer=0, trains_base=not config.freeze_base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int, shared: Operations = ()) -> Draft:
        """It changes nothing until it is trained."""
        operations = self.operations(model, config, shared)
        return Draft(operations, *fresh_adapters(model, config, seed))


def _targets(model: PreTrainedModel, config: ExtensionConfig) -> dict[str, tuple[int, int]]:
    targets = lora.matched(lora.adaptable(model), config.targets(model))
    lora.require_rank(targets, config.lora_r)
    return targets


def adapters_size(model: PreTrainedModel, config: ExtensionConfig) -> int:
    """Parameters of the adapters on a model as it is now."""
    return lora_parameters(_targets(model, config), config.lora_r, config.lora_variant)


def fresh_adapters(
    model: PreTrainedModel, config: ExtensionConfig, seed: int
) -> tuple[Mapping[str, torch.Tensor], LoraConfig]:
    """The weights that adapters on a model as it is now begin with, and PEFT's configuration of them."""
    adapter = config.peft(model)
    fresh = lora.fresh_triplets if config.lora_variant == "adalora" else lora.fresh_weights
    weights: Mapping[str, torch.Tensor] = fresh(_targets(model, config), config.lora_r, seed)
    if config.lora_variant == "dora":
        weights = lora.build(model, adapter, weights, fresh=True).state()
    return weights, adapter
