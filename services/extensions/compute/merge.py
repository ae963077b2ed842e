"""Extensions that become models: merged into a copy of their base, or trained together with one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from services.residency.fingerprint import LENGTH, fixed_input
from services.residency.lenses.extension import Extension, ExtensionRefused, Extensions
from services.residency.lenses.extension_files import attachable
from services.residency.quantize import is_quantized

WHOLE = "whole_model."
"""What precedes the names of a base's own parameters where they are trained with an extension's."""
KEY = "whole"
"""Under which `copy_to_train` attaches the extension."""
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True)
class Merged:
    """A model of its own that computes what a base with an extension does."""

    model: PreTrainedModel
    """Shares no memory with the base."""
    largest_logit_difference: float
    """Between the merged model and the base with the extension, over every logit of the probe."""


def merge(model: PreTrainedModel, attached: Extensions, key: str, probe_ids: torch.Tensor | None = None) -> Merged:
    """Merge an extension into a copy of its base; the base stays as it is.

    Args:
        model: the base, not quantised: rounding would give another function (peft#2321).
        attached: where the extension is.
        key: the extension.
        probe_ids: [B, S] token ids to compare on; a fixed input when None.

    Raises:
        ExtensionRefused: the base is quantised, or transformers has no such model.
    """
    _require_unquantized(model)
    _require_one_width(attached[key])
    if probe_ids is None:
        probe_ids = fixed_input(model.config.vocab_size, LENGTH).to(model.device)
    with attached.using(key), torch.inference_mode(False):
        expected = _logits(model, probe_ids)
        merged = deepcopy(model)
    for path, wrapper in [(path, module) for path, module in merged.named_modules() if isinstance(module, LoraLayer)]:
        wrapper.merge(safe_merge=True)
        parent, _, name = path.rpartition(".")
        setattr(merged.get_submodule(parent), name, wrapper.get_base_layer())
    difference = (_logits(merged, probe_ids).float() - expected.float()).abs().max()
    return Merged(merged, float(difference))


def copy_to_train(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Extensions]:
    """A private copy of a base with the extension in `folder` attached as `KEY`, every parameter of both trainable.

    What `freeze_base: false` trains; `merge` makes a model of it afterwards.

    Raises:
        ExtensionRefused: the base is quantised, or the folder does not fit it.
    """
    _require_unquantized(model)
    with torch.inference_mode(False):
        own = deepcopy(model)
    extension = attachable(folder, own)
    _require_one_width(extension)
    base = {WHOLE + name: parameter for name, parameter in own.named_parameters()}
    attached = Extensions()
    attached.attach(KEY, replace(extension, parameters={**extension.parameters, **base}))
    return own, attached


def write_model(model: PreTrainedModel, tokenizer: Path | None = None) -> Callable[[Path], None]:
    """Writes a model as a folder of config and safetensors that loads as a model.

    Args:
        model: without extensions; must not change until it is written.
        tokenizer: folder whose tokenizer files are copied.

    Returns:
        Writes into an empty folder.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            for path in (path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)):
                shutil.copyfile(path, folder / path.name)

    return write


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    targets = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **targets).logits


def _require_unquantized(model: PreTrainedModel) -> None:
    if is_quantized(model):
        raise ExtensionRefused("base", "is quantised, and its weights cannot take an extension in without rounding it")


def _require_one_width(extension: Extension) -> None:
    if any("mlp_width" in operation for operation in extension.operations):
        raise ExtensionRefused("layers.mlp_width", "transformers has no model whose layers differ in width")
