"""SAELens >= 6: `cfg.json` and `sae_weights.safetensors`, a JumpReLU or ReLU transcoder with or without skip path."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.residency.lenses.transcoder_files import CONFIG, WEIGHTS, read_json, read_tensors
from services.training.compute.formats.stored import Stored, taken, zeros_for

ACTIVATIONS = ("jumprelu",)
ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_NEUTRAL = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
_INFO = {
    "model_name": "model",
    "hook_name": "source_hook_point",
    "hook_name_out": "target_hook_point",
    "layer": "layer",
}


def write(transcoder: Transcoder, path: Path, gain: Tensor | None) -> dict[str, Tensor]:
    """Our own folder is SAELens' already."""
    transcoder.save(path)
    return {}


def read(path: Path, layer: int | None) -> Stored:
    """A folder.

    Raises:
        ValueError: it is no transcoder, or does something to its input that we have no place for.
    """
    config = read_json(path / CONFIG)
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{CONFIG}: architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}")
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral) != neutral:
            raise ValueError(f"{CONFIG}: {name} is {config[name]!r}, only {neutral!r} can be read")
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    names |= {"threshold": "threshold"} if architecture.startswith("jumprelu") else {}
    names |= {"W_skip": "W_skip"} if "skip" in architecture else {}
    weights = taken(read_tensors(path / WEIGHTS), WEIGHTS, names)
    weights.setdefault("threshold", zeros_for(weights))
    metadata = config.get("metadata") or {}
    info = {ours: metadata[theirs] for theirs, ours in _INFO.items() if metadata.get(theirs) is not None}
    if layer is not None:
        info["layer"] = layer
    return Stored(weights, "jumprelu", info=info)
