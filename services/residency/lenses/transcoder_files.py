"""A transcoder's folder: SAELens' `cfg.json` and `sae_weights.safetensors`, and `transcoder.json` with what is ours.

SAELens >= 6 opens the folder as a (skip-)JumpReLU transcoder; the top-k and the nested groups, which it has no words
for, stand in `transcoder.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
SAE_LENS_VERSION = "6.54.12"
"""Whose format the two shared files follow."""
WEIGHTS, CONFIG, OURS = "sae_weights.safetensors", "cfg.json", "transcoder.json"


def check(weights: Mapping[str, Tensor], dict_size: int) -> None:
    """Every tensor is there and fits the others.

    Raises:
        ValueError: names the tensor.
    """
    if missing := {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} - weights.keys():
        raise ValueError(f"{', '.join(sorted(missing))}: missing")
    d_in, d_out = weights["W_enc"].shape[0], weights["W_dec"].shape[-1]
    expected = {
        "W_enc": (d_in, dict_size),
        "b_enc": (dict_size,),
        "W_dec": (dict_size, d_out),
        "b_dec": (d_out,),
        "threshold": (dict_size,),
        "W_skip": (d_out, d_in),
    }
    for name, tensor in weights.items():
        if name not in expected:
            raise ValueError(f"{name}: not a tensor of a transcoder")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: {list(tensor.shape)}, expected {list(expected[name])}")


def write(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the three files into the folder `path`, which is made when it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(stored, path / WEIGHTS)
    write_json(path / CONFIG, _sae_lens_config(stored, config, info))
    write_ours(path / OURS, config, info)


def write_ours(file: Path, config: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write what no other format has words for into a file beside its own."""
    write_json(file, {"format": FORMAT, **config, "info": dict(info)})


def read(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Weights, our configuration and the info of the folder `path`.

    Raises:
        ValueError: a file is missing, cut short or of another format; the message names the file, never the folder.
    """
    config, info = read_ours(path / OURS)
    return read_tensors(path / WEIGHTS, device), config, info


def read_ours(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our configuration and the info that `write_ours` wrote.

    Raises:
        ValueError: the file is missing or of another format.
    """
    ours = read_json(file)
    if ours.get("format") != FORMAT:
        raise ValueError(f"{file.name}: format {ours.get('format')!r}, expected {FORMAT}")
    for key in ("activation", "top_k", "group_sizes"):
        if key not in ours:
            raise ValueError(f"{file.name}: {key} is missing")
    info = ours.pop("info", {})
    return ours, info


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: it is missing or cut short; the message names the file, never its folder.
    """
    try:
        found = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name}: cannot be read as safetensors") from error
    # On a CPU they are a mapping of the file: a file that is cut short then would end the process.
    return {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in found.items()}


def _sae_lens_config(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], info: Mapping[str, Any]
) -> dict[str, Any]:
    skip = "skip_" if "W_skip" in weights else ""
    names = {"model_name": "model", "hook_name": "source_hook_point", "hook_name_out": "target_hook_point"}
    return {
        "architecture": f"jumprelu_{skip}transcoder",
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "d_out": weights["W_dec"].shape[1],
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, "training_architecture": config["activation"]}
        | {k: info[v] for k, v in names.items() if v in info},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The same content gives the same bytes."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is missing or holds something else; the message names it, never its folder.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: not a JSON object")
    return content
