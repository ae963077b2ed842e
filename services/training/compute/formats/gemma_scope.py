"""Gemma Scope: `params.npz` (JumpReLU, no skip path); of Gemma Scope 2 also `params.safetensors` is read.

Gemma Scope's transcoders for Gemma-2 read the normalised input WITHOUT the norm's gain (arXiv:2408.05147, appendix B),
ours read what the MLP consumes, which has it: `conversion.without_gain` goes from one to the other. Gemma Scope 2 has
the gain applied.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.residency.lenses.transcoder_files import read_tensors
from services.training.compute.config import ConfigError
from services.training.compute.formats import conversion
from services.training.compute.formats.stored import Stored, layer_in, points, taken

ACTIVATIONS = ("jumprelu",)
WEIGHTS, WEIGHTS_2 = "params.npz", "params.safetensors"
NORMALIZED = "ln2.hook_normalized"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SECOND = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
_SECOND_SKIP = "affine_skip_connection"


def write(transcoder: Transcoder, path: Path, gain: Tensor | None) -> dict[str, Tensor]:
    """`params.npz`, and what makes it exact again: the gain, and what float32 lost when it was multiplied in.

    Raises:
        ConfigError: there is a skip path, for which the file has no place; or the gain is missing or not wanted.
    """
    if transcoder.W_skip is not None:
        raise ConfigError("format", "Gemma Scope's npz has no place for a skip path")
    tensors = {name: getattr(transcoder, name) for name in _NAMES}
    rest: dict[str, Tensor] = {}
    if _reads_gain(transcoder.info):
        if gain is None:
            raise ConfigError("gain", "is needed: the transcoder reads the norm's output, Gemma Scope's read it bare")
        tensors["W_enc"], lost = conversion.without_gain(transcoder.W_enc, gain)
        rest = {"gain": gain.float(), "W_enc": lost}
    elif gain is not None:
        raise ConfigError("gain", "the transcoder's input has no gain applied")
    arrays: dict[str, Any] = {name: tensor.float().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    np.savez(path / WEIGHTS, **arrays)
    return rest


def read(path: Path, layer: int | None) -> Stored:
    """A folder or its file; the path's parts say the layer where `layer` does not.

    Raises:
        ValueError: the file is missing, cut short, holds objects, or lacks an array.
    """
    file = path if path.is_file() else path / (WEIGHTS if (path / WEIGHTS).exists() else WEIGHTS_2)
    if layer is None:
        layer = next((found for part in reversed(file.parts) if (found := layer_in(part)) is not None), None)
    if file.suffix == ".npz":
        weights = taken(_arrays(file), file.name, {name: name for name in _NAMES})
        info = points(layer, NORMALIZED, "hook_mlp_out") | {"apply_rmsnorm_scaling": False}
        return Stored(weights, "jumprelu", info=info)
    tensors = read_tensors(file)
    names = _SECOND | ({"W_skip": _SECOND_SKIP} if _SECOND_SKIP in tensors else {})
    weights = taken(tensors, file.name, names)
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T
    return Stored(weights, "jumprelu", info=points(layer, "mlp.hook_in", "hook_mlp_out"))


def _reads_gain(info: dict[str, Any]) -> bool:
    """Whether the transcoder's input has the norm's gain applied.

    Raises:
        ConfigError: it reads the residual stream, or does not say what it reads.
    """
    suffix = ".".join(str(info.get("source_hook_point", "")).split(".")[2:])
    if suffix == NORMALIZED:
        return bool(info.get("apply_rmsnorm_scaling", True))
    if suffix in ("mlp.hook_in", "ln2.hook_out"):
        return True
    raise ConfigError("format", f"Gemma Scope reads the MLP's input, not {suffix or 'an input that is not named'}")


def _arrays(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file.name}: cannot be read as npz of plain arrays") from error
