"""One forward for several tasks: every row with an adapter of its own, the base's products once for all.

PEFT's own mixed batches (`adapter_names`) over the wrappers of several attached extensions. Rows get what they would
get alone but for the order of additions, which in a matrix product depends on the number of rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn

from services.residency.lenses.extension import Edit, Extension, ExtensionRefused, Extensions, applied
from services.residency.lenses.lora import ADAPTER

BARE = "__base__"
"""PEFT's name for a row without an adapter."""


def mixable(extension: Extension) -> bool:
    """Whether rows with this extension may share a forward with others: adapters alone, LoRA or rsLoRA."""
    return all(
        isinstance(edit.value, LoraLayer)
        and not isinstance(edit.value, AdaLoraLayer)
        and not edit.value.use_dora.get(ADAPTER)
        for edit in extension.edits
    )


@contextmanager
def rows(extensions: Extensions, keys: Sequence[str | None]) -> Iterator[None]:
    """Forwards inside the block take exactly len(keys) rows, row i with the extension keys[i]; None is the bare base.

    The model is in eval mode; what is active before is so again afterwards.

    Raises:
        KeyError: an extension is not attached.
        ExtensionRefused: one of them inserts layers, or is a DoRA or AdaLoRA.
    """
    names = {key: BARE if key is None else f"task-{number}" for number, key in enumerate(dict.fromkeys(keys))}
    places: dict[tuple[int, str], list[tuple[str, Edit]]] = {}
    for key, name in names.items():
        if key is None:
            continue
        if not mixable(extensions[key]):
            raise ExtensionRefused("extension", f"{key} cannot share a forward with others: it is more than LoRA")
        for edit in extensions[key].edits:
            places.setdefault((id(edit.owner), edit.name), []).append((name, edit))
    hook = partial(_name_rows, adapter_names=[names[key] for key in keys])
    edits = [Edit(found[0][1].owner, found[0][1].name, _together(found, hook)) for found in places.values()]
    with extensions.using(None), applied(edits):
        yield


def _together(found: Sequence[tuple[str, Edit]], hook: Any) -> nn.Module:
    """A wrapper that holds the adapters of several, sharing their tensors."""
    wrappers: Mapping[str, Any] = {name: edit.value for name, edit in found}
    merged = copy(next(iter(wrappers.values())))
    merged._modules = dict(merged._modules)
    for part in ("lora_A", "lora_B", "lora_dropout"):
        held = {name: getattr(wrapper, part)[ADAPTER] for name, wrapper in wrappers.items()}
        merged._modules[part] = nn.ModuleDict(held)
    merged.scaling = {name: wrapper.scaling[ADAPTER] for name, wrapper in wrappers.items()}
    merged.use_dora = dict.fromkeys(wrappers, False)
    merged._forward_pre_hooks, merged._forward_pre_hooks_with_kwargs = OrderedDict(), OrderedDict()
    merged.register_forward_pre_hook(hook, with_kwargs=True)
    return merged


def _name_rows(_: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}
