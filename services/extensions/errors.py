"""Failures of torch code and of files as errors of the mesh, with the field names that clients know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.extensions.compute.config import ConfigInvalid
from services.extensions.compute.train import Diverged
from services.kit import errors
from services.residency.lenses.extension import ExtensionRefused

_FIELDS = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_variant": "lora.variant",
    "lora_target_r": "lora.target_r",
    "layer_position": "layer.position",
    "layer_index": "layer.index",
    "layer_initialization_scale": "layer.initialization_scale",
}


@contextmanager
def requests() -> Iterator[None]:
    """What a request asks for is refused with its fields named.

    Raises:
        errors.Invalid: a configuration is wrong or does not fit the model.
    """
    try:
        yield
    except ConfigInvalid as error:
        named = [(_FIELDS.get(field, field), description) for field, description in error.violations]
        message = "; ".join(f"{field}: {description}" for field, description in named)
        raise errors.Invalid(message, violations=named) from error
    except ExtensionRefused as error:
        raise errors.Invalid.of(error.field, error.description) from error


@contextmanager
def stored() -> Iterator[None]:
    """What is stored and cannot be used any more.

    Raises:
        errors.Conflict: `LENS_INCOMPATIBLE`: its files do not fit the base, or are damaged.
        errors.Failed: `NON_FINITE_LOSS`: a training diverged.
    """
    try:
        yield
    except ExtensionRefused as error:
        raise errors.Conflict(str(error), reason="LENS_INCOMPATIBLE") from error
    except Diverged as error:
        raise errors.Failed(str(error), reason="NON_FINITE_LOSS") from error
