"""A new extension before it exists: what it shall be, what it counts, and its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts
from services.extensions.compute.kinds import KINDS, Operations
from services.residency.lenses.extension import ExtensionRefused
from services.residency.lenses.extension_files import INSERTED_FILE, Manifest, read_manifest, structure, write
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
    shared: Path | None = None
    """Folder of the extension that `config.shared_layer_of` names."""

    @property
    def needs_base(self) -> bool:
        """Whether `prepare` needs the live base, or its skeleton is enough."""
        return KINDS[self.kind].needs_base(self.config)

    def counts(self, model: PreTrainedModel) -> ParameterCounts:
        """Exact counts; `model` may be a skeleton.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """
        return KINDS[self.kind].counts(model, self.config, self.base_parameters, self._insertions(model))

    def operations(self, model: PreTrainedModel) -> Operations:
        """What will be done to the base, in order; `model` may be a skeleton.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """
        return KINDS[self.kind].operations(model, self.config, self._insertions(model))

    def prepare(self, model: PreTrainedModel) -> Callable[[Path], None]:
        """Make the extension for the bare base or its skeleton.

        Returns:
            Writes its files into an empty folder; needs the model no more, but the folder of shared layers.

        Raises:
            ExtensionRefused: the configuration does not fit the model.
        """
        draft = KINDS[self.kind].draft(model, self.config, self.seed, self._insertions(model))
        manifest = Manifest(
            kind=self.kind,
            task_name=self.task_name,
            operations=tuple(dict(operation) for operation in draft.operations),
            base_structure=structure(model),
            base_digest=self.base_digest,
            config=self.config.as_dict(),
            parameter_counts=self.counts(model).as_dict(),
            layers_frozen=self.shared is not None and not self.config.train_shared_layer,
        )
        adapter_config = config_json(draft.adapter) if draft.adapter is not None else None
        layers = self.shared / INSERTED_FILE if self.shared is not None else None
        return lambda folder: write(folder, manifest, draft.weights, adapter_config, layers)

    def _insertions(self, model: PreTrainedModel) -> Operations:
        """How the extension whose layers are shared inserts them.

        Raises:
            ExtensionRefused: it is for another base.
        """
        if self.shared is None:
            return ()
        manifest = read_manifest(self.shared)
        digests = {self.base_digest, manifest.base_digest}
        if ("" not in digests and len(digests) > 1) or manifest.base_structure != structure(model):
            raise ExtensionRefused("shared_layer_of", "is an extension of another base")
        return tuple(operation for operation in manifest.operations if operation["op"] == "insert")
