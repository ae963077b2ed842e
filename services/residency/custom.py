"""Model classes of the operator's own: installed with the process, and named in a setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from services.kit import errors


def allow(names: Iterable[str]) -> frozenset[str]:
    """Import classes and register them with transformers under their config's `model_type`; the classes' names.

    Args:
        names: `package.module:Class` each.

    Raises:
        ValueError: there is no such class, it is no PreTrainedModel with a config of its own, or its `model_type` is
            one that transformers knows as another's.
    """
    return frozenset(_allow(name) for name in names)


def _allow(name: str) -> str:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not the name of an installed class, package.module:Class") from error
    config = getattr(found, "config_class", None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and config is not None):
        raise ValueError(f"{name} is no PreTrainedModel with a config class")
    auto = AutoModelForSeq2SeqLM if config().is_encoder_decoder else AutoModelForCausalLM
    AutoConfig.register(config.model_type, config, exist_ok=_is_ours(config))
    auto.register(config, found, exist_ok=_is_ours(config))
    return found.__name__


def _is_ours(config: type) -> bool:
    return not config.__module__.startswith("transformers.")


def check(config: Mapping[str, object], allowed: frozenset[str]) -> None:
    """Refuse a custom model whose class the operator did not name.

    Raises:
        errors.Unsupported: says which class it would need.
    """
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name not in allowed:
        raise errors.Unsupported(
            f"The config names the class {name!r}, which is none of LENSMESH_CUSTOM_CLASSES",
            metadata={"class": name, "allowed": ", ".join(sorted(allowed))},
        )
