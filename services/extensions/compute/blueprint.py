"""A new extension before it exists: what it shall be, what it counts, and its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts
from services.extensions.compute.kinds import KINDS
from services.residency.lenses.extension_files import Manifest, structure, write
from services.residency.lenses.lora import config_json


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
        adapter_config = config_json(draft.adapter) if draft.adapter is not None else None
        return lambda folder: write(folder, manifest, draft.weights, adapter_config)
