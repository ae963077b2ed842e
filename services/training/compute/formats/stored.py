"""What a file of another tool says, in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights under `Transcoder`'s names and shapes, float32.

    Attributes:
        weights: threshold is missing where the file has a top-k instead.
        activation: `topk` or `jumprelu`.
        top_k: 0 where the file does not say it.
        info: hook points and layer as far as they are known.
    """

    weights: dict[str, Tensor]
    activation: str
    top_k: int = 0
    info: dict[str, Any] = field(default_factory=dict)


def taken(tensors: Mapping[str, Tensor], file: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file under our names, in float32; `names` maps ours to the file's.

    Raises:
        ValueError: one is missing, or the file holds others, which would be lost.
    """
    if missing := [theirs for theirs in names.values() if theirs not in tensors]:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    if unknown := sorted(tensors.keys() - set(names.values())):
        raise ValueError(f"{file}: {', '.join(unknown)} is not known")
    return {ours: tensors[theirs].float() for ours, theirs in names.items()}


def zeros_for(weights: Mapping[str, Tensor]) -> Tensor:
    """The threshold of a plain ReLU, [dict_size]."""
    return torch.zeros_like(weights["b_enc"])


def number(config: Mapping[str, Any], file: str, name: str) -> int:
    """A positive whole number of a configuration.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{file}: {name} is {value!r}, expected a positive whole number")
    return value


def folder_of(path: Path) -> Path:
    """The folder that a path, of a folder or of a file in it, is about."""
    return path if path.is_dir() else path.parent


def layer_in(name: str) -> int | None:
    """The layer that a file or folder is named after: `layer_3.safetensors`, `layers.3.mlp`, `h.3.mlp`."""
    found = re.search(r"(?:layer_|layers\.|h\.)(\d+)", name)
    return int(found[1]) if found else None


def points(layer: int | None, source: str, target: str) -> dict[str, Any]:
    """Info of a layer and its two hook points, given as suffixes."""
    if layer is None:
        return {}
    prefix = f"blocks.{layer}."
    return {"layer": layer, "source_hook_point": prefix + source, "target_hook_point": prefix + target}
