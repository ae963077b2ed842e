"""circuit-tracer's `transcoder_set`: `config.yaml` and `layer_<n>.safetensors`, JumpReLU, ReLU or TopK.

A set has all layers from 0 on: write one after the other into the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.residency.lenses.transcoder_files import read_tensors
from services.training.compute.config import ConfigError
from services.training.compute.formats.stored import Stored, folder_of, layer_in, points, taken, zeros_for

ACTIVATIONS = ("topk", "jumprelu")
CONFIG, KIND, THRESHOLD = "config.yaml", "transcoder_set", "activation_function.threshold"
INPUT, OUTPUT = "mlp.hook_in", "hook_mlp_out"
_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def write(transcoder: Transcoder, path: Path, gain: Tensor | None) -> dict[str, Tensor]:
    """One layer's file, and the set's configuration, which is the same for all of them.

    Raises:
        ConfigError: the widths differ, no layer is known, or the folder holds a set of another kind.
    """
    if transcoder.d_in != transcoder.d_out:
        raise ConfigError("format", f"circuit-tracer has one width, not {transcoder.d_in} and {transcoder.d_out}")
    if not isinstance(layer := transcoder.info.get("layer"), int):
        raise ConfigError("transcoder", "its info names no layer")
    config: dict[str, Any] = {
        "model_name": str(transcoder.info.get("model", "")),
        "model_kind": KIND,
        "feature_input_hook": _suffix(transcoder, "source_hook_point", INPUT),
        "feature_output_hook": _suffix(transcoder, "target_hook_point", OUTPUT),
        "activation": "topk" if transcoder.shape.activation == "topk" else "relu",
    }
    tensors = {"W_enc": transcoder.W_enc.T, "b_enc": transcoder.b_enc}
    tensors |= {"W_dec": transcoder.W_dec, "b_dec": transcoder.b_dec}
    if transcoder.W_skip is not None:
        tensors["W_skip"] = transcoder.W_skip
    if transcoder.shape.activation == "topk":
        config["k"] = transcoder.shape.top_k
        tensors["k"] = torch.tensor(transcoder.shape.top_k)
    else:
        tensors[THRESHOLD] = transcoder.threshold
    if (path / CONFIG).exists() and _config(path) != config:
        raise ConfigError("path", f"{CONFIG} there is of another set")
    (path / CONFIG).write_text(yaml.safe_dump(config, sort_keys=True), encoding="utf-8")
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, path / f"layer_{layer}.safetensors")
    return {"threshold": transcoder.threshold} if transcoder.shape.activation == "topk" else {}


def read(path: Path, layer: int | None) -> Stored:
    """One layer of a folder, or one file.

    Raises:
        ValueError: it is something else, holds several layers and none is named, or lacks k.
    """
    file = path if path.is_file() else _layer_file(path, layer)
    layer = layer_in(file.name) if layer is None else layer
    config = _config(folder_of(path)) if (folder_of(path) / CONFIG).exists() else {}
    if config.get("model_kind", KIND) != KIND:
        raise ValueError(f"{CONFIG}: model_kind {config['model_kind']!r}, only {KIND!r} can be read")
    tensors = read_tensors(file)
    topk = config.get("activation") == "topk" or "k" in tensors
    k = int(tensors.pop("k")) if "k" in tensors else config.get("k", 0)
    names = _NAMES | ({"W_skip": "W_skip"} if "W_skip" in tensors else {})
    names |= {"threshold": THRESHOLD} if THRESHOLD in tensors else {}
    weights = taken(tensors, file.name, names)
    weights["W_enc"] = weights["W_enc"].T
    hooks = (str(config.get("feature_input_hook", INPUT)), str(config.get("feature_output_hook", OUTPUT)))
    info = points(layer, *hooks) | ({"model": config["model_name"]} if config.get("model_name") else {})
    if not topk:
        weights.setdefault("threshold", zeros_for(weights))
        return Stored(weights, "jumprelu", info=info)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{CONFIG}: activation is topk, but k is said nowhere")
    return Stored(weights, "topk", k, info)


def _suffix(transcoder: Transcoder, name: str, default: str) -> str:
    """A hook point without its block."""
    return str(transcoder.info[name]).split(".", 2)[2] if name in transcoder.info else default


def _layer_file(path: Path, layer: int | None) -> Path:
    if layer is not None:
        return path / f"layer_{layer}.safetensors"
    found = sorted(path.glob("layer_*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files layer_*.safetensors: name one layer")
    return found[0]


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG}: cannot be read as YAML") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG}: not a mapping")
    return config
