"""Extensions of several tasks on one base in memory, as notebooks use them (spec/004's utility classes)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, require_task_name
from services.extensions.compute.count import ParameterCounts, distinct_parameters
from services.extensions.compute.kinds import KINDS, Draft
from services.extensions.compute.resources import place
from services.residency.lenses.extension import Extension, Extensions
from services.residency.lenses.extension_files import Manifest, assemble, read, structure, write
from services.residency.lenses.lora import KEY_PREFIX, config_json


class TaskExtensions:
    """Creates, switches, saves and loads extensions of one kind; `model` is the base throughout, never a copy."""

    kind: str
    """A key of `KINDS`."""

    def __init__(self, base_model: PreTrainedModel, config: ExtensionConfig, device: str | None = None) -> None:
        """Extend a base.

        Args:
            base_model: used as it is.
            config: how tasks extend it.
            device: where to bring the base first, in the dtype that suits it there; `auto` for the best one there is.
        """
        self.model = place(base_model, device) if device is not None else base_model
        self.config = config
        self.attached = Extensions()
        self._configs: dict[str, ExtensionConfig] = {}
        self._adapters: dict[str, LoraConfig | None] = {}
        self._layers: dict[str, Extension | None] = {}

    def _create(self, task_name: str, seed: int, shared_with: str | None = None) -> PreTrainedModel:
        config = self.config if shared_with is None else self.config.over_layers_of(shared_with)
        layers = self._layers[shared_with] if shared_with is not None else None
        with self.attached.using(None):
            require_task_name(task_name, (path for path, _ in self.model.named_modules()))
            operations = layers.operations if layers is not None else ()
            draft = KINDS[self.kind].draft(self.model, config, seed, operations)
            self._attach(task_name, config, draft, layers)
        return self.switch_to(task_name)

    def _attach(self, task_name: str, config: ExtensionConfig, draft: Draft, layers: Extension | None = None) -> None:
        """Put the parts together; layers are kept apart, so that other tasks may share them."""
        weights = dict(draft.weights)
        if layers is None:
            inserted = {key: tensor for key, tensor in weights.items() if not key.startswith(KEY_PREFIX)}
            insertions = [operation for operation in draft.operations if operation["op"] == "insert"]
            layers = assemble(self.model, insertions, inserted, None) if insertions else None
        else:
            weights |= layers.parameters
        extension = assemble(self.model, draft.operations, weights, draft.adapter, layers=layers)
        if config.shared_layer_of and not config.train_shared_layer:
            extension = replace(extension, frozen=frozenset(layers.parameters if layers is not None else ()))
        self.attached.attach(task_name, extension)
        self._configs[task_name], self._adapters[task_name], self._layers[task_name] = config, draft.adapter, layers

    def switch_to(self, task_name: str | None) -> PreTrainedModel:
        """Make a task's extension the active one, or none: then the logits are the base's, bit for bit.

        Raises:
            KeyError: the task has none.
        """
        self.attached.activate(task_name)
        return self.model

    def remove(self, task_name: str) -> None:
        """Forget a task's extension; its memory is free once nobody else holds its tensors.

        Raises:
            KeyError: the task has none.
        """
        self.attached.detach(task_name)
        for kept in (self._configs, self._adapters, self._layers):
            del kept[task_name]

    def parameter_counts(self, task_name: str) -> ParameterCounts:
        """Counts of a task's extension as it is now, and of the base."""
        extension = self.attached[task_name]
        adapters = {key for key in extension.parameters if key.startswith(KEY_PREFIX)}
        with self.attached.using(None):
            base = distinct_parameters(self.model)

        def size(keys: Iterable[str]) -> int:
            return sum(extension.parameters[key].numel() for key in keys)

        return ParameterCounts(
            base=base,
            lora=size(adapters),
            layer=size(extension.parameters.keys() - adapters),
            shared=size(extension.frozen),
            trains_base=not self.config.freeze_base,
        )

    def save(self, task_name: str, folder: Path | None = None) -> Path:
        """Write an extension to a new folder, by default `save_path/task_name`; `lora/` in it is a PEFT adapter.

        Raises:
            FileExistsError: the folder exists.
        """
        folder = folder or self.config.save_path / task_name
        folder.mkdir(parents=True)
        extension, config, adapter = self.attached[task_name], self._configs[task_name], self._adapters[task_name]
        counts = self.parameter_counts(task_name)
        with self.attached.using(None):
            base_structure = structure(self.model)
        manifest = Manifest(
            kind=self.kind,
            task_name=task_name,
            operations=tuple(dict(operation) for operation in extension.operations),
            base_structure=base_structure,
            config=config.as_dict(),
            parameter_counts=counts.as_dict(),
            layers_frozen=bool(extension.frozen),
        )
        write(folder, manifest, extension.state(), config_json(adapter) if adapter is not None else None)
        return folder

    def load(self, folder: Path) -> str:
        """Attach what `save` wrote, inactive; the result is the task's name.

        Raises:
            ExtensionRefused: the folder does not fit this base, or is damaged.
            ConfigInvalid: its configuration is damaged.
            KeyError: the task has an extension already.
        """
        with self.attached.using(None):
            manifest, weights, adapter = read(folder, self.model)
            config = ExtensionConfig.from_dict(manifest.config)
            self._attach(manifest.task_name, config, Draft(manifest.operations, weights, adapter))
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

    def create_hybrid_model(self, task_name: str, seed: int = 0, shared_with: str | None = None) -> PreTrainedModel:
        """Insert the layers, attach adapters to everything, and make both active.

        Args:
            task_name: the new task.
            seed: of the adapters.
            shared_with: task whose layers it uses instead of its own; they are in memory once.

        Returns:
            The base itself, which now computes with both.

        Raises:
            ConfigInvalid: the name is not usable.
            ExtensionRefused: the configuration does not fit the model.
            KeyError: the task has an extension already, or the other one has none.
        """
        return self._create(task_name, seed, shared_with)
