"""Extensions of several tasks on one base in memory, as notebooks use them (spec/004's utility classes)."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, require_task_name
from services.extensions.compute.count import ParameterCounts, distinct_parameters
from services.extensions.compute.kinds import KINDS, Draft
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import Manifest, assemble, read, structure, write
from services.residency.lenses.lora import KEY_PREFIX, config_json


class TaskExtensions:
    """Creates, switches, saves and loads extensions of one kind; `model` is the base throughout, never a copy."""

    kind: str
    """A key of `KINDS`."""

    def __init__(self, base_model: PreTrainedModel, config: ExtensionConfig) -> None:
        self.model = base_model
        self.config = config
        self.attached = Extensions()
        self._drafts: dict[str, Draft] = {}

    def _create(self, task_name: str, seed: int) -> PreTrainedModel:
        with self.attached.using(None):
            require_task_name(task_name, (path for path, _ in self.model.named_modules()))
            self._attach(task_name, KINDS[self.kind].draft(self.model, self.config, seed))
        return self.switch_to(task_name)

    def _attach(self, task_name: str, draft: Draft) -> None:
        self.attached.attach(task_name, assemble(self.model, draft.operations, draft.weights, draft.adapter))
        self._drafts[task_name] = draft

    def switch_to(self, task_name: str | None) -> PreTrainedModel:
        """Make a task's extension the active one, or none: then the logits are the base's, bit for bit.

        Raises:
            KeyError: the task has none.
        """
        self.attached.activate(task_name)
        return self.model

    def parameter_counts(self, task_name: str) -> ParameterCounts:
        """Counts of a task's extension and of the base."""
        counted = {True: 0, False: 0}
        for key, parameter in self.attached[task_name].parameters.items():
            counted[key.startswith(KEY_PREFIX)] += parameter.numel()
        with self.attached.using(None):
            return ParameterCounts(base=distinct_parameters(self.model), lora=counted[True], layer=counted[False])

    def save(self, task_name: str, folder: Path | None = None) -> Path:
        """Write an extension to a new folder, by default `save_path/task_name`; `lora/` in it is a PEFT adapter.

        Raises:
            FileExistsError: the folder exists.
        """
        folder = folder or self.config.save_path / task_name
        folder.mkdir(parents=True)
        draft, counts = self._drafts[task_name], self.parameter_counts(task_name)
        with self.attached.using(None):
            base_structure = structure(self.model)
        manifest = Manifest(
            kind=self.kind,
            task_name=task_name,
            operations=draft.operations,
            base_structure=base_structure,
            config=self.config.as_dict(),
            parameter_counts=counts.as_dict(),
        )
        adapter_config = config_json(draft.adapter) if draft.adapter is not None else None
        write(folder, manifest, self.attached[task_name].state(), adapter_config)
        return folder

    def load(self, folder: Path) -> str:
        """Attach what `save` wrote, inactive; the result is the task's name.

        Raises:
            ExtensionRefused: the folder does not fit this base, or is damaged.
            KeyError: the task has an extension already.
        """
        with self.attached.using(None):
            manifest, weights, adapter = read(folder, self.model)
            self._attach(manifest.task_name, Draft(manifest.operations, weights, adapter))
        return manifest.task_name


class LoRAExtension(TaskExtensions):
    """LoRA adapters."""

    kind = "lora"

    def create_adapter(self, task_name: str, seed: int = 0) -> PreTrainedModel:
        """Attach a fresh adapter and make it the active one.

        Returns:
            The base itself, which now computes with the adapter.

        Raises:
            ConfigInvalid: the name is not usable.
            ExtensionRefused: targets or rank do not fit the model.
            KeyError: the task has an adapter already.
        """
        return self._create(task_name, seed)


class TransformerLayerExtension(TaskExtensions):
    """Inserted transformer layers."""

    kind = "layer"

    def create_extended_model(self, task_name: str) -> PreTrainedModel:
        """Insert a copy of a neighbouring layer and make it active.

        Returns:
            The base itself, which now computes with the layer.

        Raises:
            ConfigInvalid: the name is not usable.
            ExtensionRefused: the model, position or index do not fit.
            KeyError: the task has a layer already.
        """
        return self._create(task_name, seed=0)


class HybridExtension(TaskExtensions):
    """Inserted layers with adapters on the base and on them."""

    kind = "hybrid"

    def create_hybrid_model(self, task_name: str, seed: int = 0) -> PreTrainedModel:
        """Insert a layer, attach adapters to everything, and make both active.

        Returns:
            The base itself, which now computes with both.

        Raises:
            ConfigInvalid: the name is not usable.
            ExtensionRefused: the configuration does not fit the model.
            KeyError: the task has an extension already.
        """
        return self._create(task_name, seed)
