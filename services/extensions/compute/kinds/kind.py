"""What a kind of extension answers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts
from services.residency.lenses.extension import ExtensionRefused

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


def require_none_shared(config: ExtensionConfig, shared: Operations) -> None:
    """Raises ExtensionRefused where layers are to be shared by a kind that has none to share."""
    if config.shared_layer_of or shared:
        raise ExtensionRefused("shared_layer_of", "belongs to an extension of kind hybrid")
