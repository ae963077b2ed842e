"""What each kind of extension is made of: its counts, and the files it begins with.

A new kind is one class and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts
from services.extensions.compute.lora_extension import lora_counts, new_adapter
from services.residency.lenses import lora
from services.residency.lenses.extension_files import Manifest, structure, write


@dataclass(frozen=True, slots=True)
class Draft:
    """What a new extension consists of."""

    operations: tuple[dict[str, Any], ...]
    """What to do to the base, in order."""
    weights: Mapping[str, torch.Tensor]
    """CPU tensors by checkpoint key."""
    adapter_config: Mapping[str, Any] | None
    """PEFT's configuration of the adapter as JSON, if it has one."""


class Kind(Protocol):
    """One kind of extension."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """Whether `draft` reads the base's weights, or its shapes alone."""

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """Exact counts; `model` may be a skeleton, `base` is the base's own count."""

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """A new extension for the bare base, or for its skeleton where that is enough."""


class LoraKind:
    """Adapters on the base's linear modules."""

    def needs_base(self, config: ExtensionConfig) -> bool:
        """DoRA's magnitudes begin as the norms of the base's weights."""
        return config.lora_variant == "dora"

    def counts(self, model: PreTrainedModel, config: ExtensionConfig, base: int) -> ParameterCounts:
        """See `lora_counts`."""
        return lora_counts(model, config, base)

    def draft(self, model: PreTrainedModel, config: ExtensionConfig, seed: int) -> Draft:
        """A random, B zero."""
        targets = lora.matched(lora.adaptable(model), config.targets(model))
        lora.require_rank(targets, config.lora_r)
        weights: Mapping[str, torch.Tensor] = lora.fresh_weights(targets, config.lora_r, seed)
        if self.needs_base(config):
            weights = new_adapter(model, config, seed).state()
        return Draft(operations=({"op": "lora"},), weights=weights, adapter_config=lora.config_json(config.peft(model)))


KINDS: dict[str, Kind] = {"lora": LoraKind()}
"""Every kind by its name in manifests and requests."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a new extension shall be; everything but the base itself."""

    kind: str
    """A key of `KINDS`."""
    task_name: str
    config: ExtensionConfig
    base_parameters: int
    """The base's own count."""
    base_digest: str = ""
    """Content digest of the base's files."""
    seed: int = 0
    """Seed of the random weights."""

    @property
    def needs_base(self) -> bool:
        """Whether `prepare` needs the live base, or its skeleton is enough."""
        return KINDS[self.kind].needs_base(self.config)

    def counts(self, model: PreTrainedModel) -> ParameterCounts:
        """Exact counts; `model` may be a skeleton.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """
        return KINDS[self.kind].counts(model, self.config, self.base_parameters)

    def prepare(self, model: PreTrainedModel) -> Callable[[Path], None]:
        """Make the extension for the bare base or its skeleton.

        Returns:
            Writes its files into an empty folder; needs the model no more.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """
        draft = KINDS[self.kind].draft(model, self.config, self.seed)
        manifest = Manifest(
            kind=self.kind,
            task_name=self.task_name,
            operations=draft.operations,
            base_structure=structure(model),
            base_digest=self.base_digest,
            config=self.config.as_dict(),
            parameter_counts=self.counts(model).as_dict(),
        )
        return lambda folder: write(folder, manifest, draft.weights, draft.adapter_config)
