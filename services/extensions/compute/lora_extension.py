"""LoRA adapters of several tasks on one base, for services and notebooks."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig, require_task_name
from services.extensions.compute.count import ParameterCounts, distinct_parameters, lora_parameters
from services.residency.lenses import lora
from services.residency.lenses.extension import Extension, Extensions
from services.residency.lenses.extension_files import Manifest, attachable, read_manifest, structure, write


def lora_counts(model: nn.Module, config: ExtensionConfig, base: int) -> ParameterCounts:
    """Counts of an adapter on a model, which may be a skeleton on the meta device.

    Args:
        model: gives the shapes.
        config: rank, targets, variant.
        base: the base's parameters, from its checkpoint where there is one.

    Raises:
        ExtensionRefused: unknown targets, or a rank above an adapted matrix's.
    """
    targets = lora.matched(lora.adaptable(model), config.targets(model))
    lora.require_rank(targets, config.lora_r)
    dora = config.lora_variant == "dora"
    return ParameterCounts(base=base, lora=lora_parameters(targets, config.lora_r, dora=dora), layer=0)


def new_adapter(model: nn.Module, config: ExtensionConfig, seed: int = 0) -> Extension:
    """A fresh adapter for a live base: it changes nothing until it is trained (B is zero).

    Raises:
        ExtensionRefused: unknown targets, or a rank above an adapted matrix's.
    """
    targets = lora.matched(lora.adaptable(model), config.targets(model))
    lora.require_rank(targets, config.lora_r)
    return lora.build(model, config.peft(model), lora.fresh_weights(targets, config.lora_r, seed), fresh=True)


class LoRAExtension:
    """Creates, switches, saves and loads adapters on a base held in memory; `model` is that base throughout."""

    def __init__(self, base_model: PreTrainedModel, config: ExtensionConfig) -> None:
        self.model = base_model
        self.config = config
        self.attached = Extensions()

    def create_adapter(self, task_name: str, seed: int = 0) -> PreTrainedModel:
        """Attach a fresh adapter and make it the active one.

        Returns:
            The base itself, which now computes with the adapter.

        Raises:
            ConfigInvalid: the name is not usable.
            ExtensionRefused: targets or rank do not fit the model.
            KeyError: the task has an adapter already.
        """
        require_task_name(task_name, (path for path, _ in self.model.named_modules()))
        with self.attached.using(None):
            extension = new_adapter(self.model, self.config, seed)
        self.attached.attach(task_name, extension)
        return self.switch_to(task_name)

    def switch_to(self, task_name: str | None) -> PreTrainedModel:
        """Make a task's adapter the active one, or none: then the logits are the base's, bit for bit."""
        self.attached.activate(task_name)
        return self.model

    def parameter_counts(self, task_name: str) -> ParameterCounts:
        """Counts of a task's adapter and of the base."""
        own = sum(parameter.numel() for parameter in self.attached[task_name].parameters.values())
        with self.attached.using(None):
            return ParameterCounts(base=distinct_parameters(self.model), lora=own, layer=0)

    def save(self, task_name: str, folder: Path | None = None) -> Path:
        """Write the adapter to a new folder, by default `save_path/task_name`; `lora/` in it is a PEFT adapter.

        Raises:
            FileExistsError: the folder exists.
        """
        folder = folder or self.config.save_path / task_name
        folder.mkdir(parents=True)
        counts = self.parameter_counts(task_name)
        with self.attached.using(None):
            manifest = Manifest(
                kind="lora",
                task_name=task_name,
                operations=({"op": "lora"},),
                base_structure=structure(self.model),
                config=self.config.as_dict(),
                parameter_counts=counts.as_dict(),
            )
            write(folder, manifest, self.attached[task_name].state(), lora.config_json(self.config.peft(self.model)))
        return folder

    def load(self, folder: Path) -> str:
        """Attach what `save` wrote, inactive; the result is the task's name.

        Raises:
            ExtensionRefused: the folder does not fit this base, or is damaged.
            KeyError: the task has an adapter already.
        """
        task_name = read_manifest(folder).task_name
        if task_name in self.attached:
            raise KeyError(f"{task_name} is attached already")
        with self.attached.using(None):
            extension = attachable(folder, self.model)
        self.attached.attach(task_name, extension)
        return task_name
