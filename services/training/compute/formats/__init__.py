"""Transcoders in other tools' files, there and back.

| format | files | activations |
|---|---|---|
| sae_lens | cfg.json, sae_weights.safetensors | JumpReLU; ReLU is read |
| sparsify | cfg.json, sae.safetensors | TopK |
| circuit_tracer | config.yaml, layer_<n>.safetensors | TopK, JumpReLU; ReLU is read |
| gemma_scope | params.npz; params.safetensors is read | JumpReLU |

Beside them stands our `transcoder.json`, with the groups that none of them knows, and `transcoder.safetensors` where
there are tensors without a place (one of each for every layer of circuit_tracer): what is exported comes back bit for
bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from safetensors.torch import save_file
from torch import Tensor

from services.residency.families import default_top_k
from services.residency.lenses import transcoder_files
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.training.compute.config import ConfigError
from services.training.compute.formats import circuit_tracer, conversion, gemma_scope, sae_lens, sparsify
from services.training.compute.formats.stored import folder_of, zeros_for
from services.training.compute.metrics import compute_fvu

_FORMATS: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "circuit_tracer": circuit_tracer,
    "gemma_scope": gemma_scope,
}
FORMATS = tuple(_FORMATS)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A transcoder on rows that nothing was fitted on."""

    l0: float
    fvu: float


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and what the conversion cost.

    Attributes:
        transcoder: what the files hold: the transcoder itself, or what it was converted to.
        thresholds: empty where nothing was converted; else `scalar`, `per_latent` or `stored`.
        wanted_l0: active latents per calibration row before the conversion; None without such rows.
        calibrated_l0: the same afterwards.
        original: on held-out rows, when they were given.
        converted: the same of what was written.
    """

    transcoder: Transcoder
    thresholds: str = ""
    wanted_l0: float | None = None
    calibrated_l0: float | None = None
    original: HeldOut | None = None
    converted: HeldOut | None = None


def export(
    transcoder: Transcoder,
    format: str,  # noqa: A002 - the name that the interface has
    path: str | os.PathLike[str],
    *,
    calibrate: Tensor | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    prefix: int | None = None,
    gain: Tensor | None = None,
) -> Export:
    """Write a transcoder into the folder `path`, which is made when it is missing.

    A topk or batch_topk transcoder becomes a JumpReLU one where the format has no top-k, where rows to calibrate its
    thresholds on are given, and for a prefix.

    Args:
        transcoder: what to write.
        format: one of FORMATS.
        path: the folder.
        calibrate: inputs [N, d_in]; without them the thresholds that training followed are taken.
        held_out: inputs [M, d_in] and targets [M, d_out] that both are judged on.
        prefix: write only so many groups.
        gain: [d_in], the gain of the norm before the MLP (1 + weight in Gemma): for gemma_scope, whose files read the
            input without it.

    Raises:
        ConfigError: (a ValueError) an argument is wrong or the format cannot hold the transcoder; no file was written.
    """
    module = _module(format)
    if gain is not None and module is not gemma_scope:
        raise ConfigError("gain", "belongs to format gemma_scope")
    written, thresholds, wanted_l0, l0 = transcoder, "", None, None
    native = transcoder.shape.activation in module.ACTIVATIONS
    if not native or prefix is not None or (calibrate is not None and transcoder.shape.activation != "jumprelu"):
        if "jumprelu" not in module.ACTIVATIONS:
            raise ConfigError("format", f"{format} stores the k largest of every row and nothing else")
        found = conversion.to_jumprelu(transcoder, calibrate)
        written, thresholds, wanted_l0, l0 = found.transcoder, found.thresholds, found.wanted_l0, found.l0
    if prefix is not None:
        if not 1 <= prefix <= len(transcoder.shape.group_sizes):
            raise ConfigError("prefix", f"{prefix} is not between 1 and {len(transcoder.shape.group_sizes)}")
        written = conversion.prefix_of(written, prefix)
    _write(module, written, Path(path), gain)
    if held_out is None:
        return Export(written, thresholds, wanted_l0, l0)
    original = judged(transcoder, *held_out, groups=prefix)
    return Export(written, thresholds, wanted_l0, l0, original, judged(written, *held_out))


def load_foreign(
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - the name that the interface has
    *,
    layer: int | None = None,
    gain: Tensor | None = None,
) -> Transcoder:
    """The transcoder of another tool's files, in float32 on the CPU; with one group where they say nothing of groups.

    Args:
        path: the folder, or the one file of circuit_tracer and gemma_scope.
        format: one of FORMATS.
        layer: which layer of several, or the layer where the files do not say it.
        gain: [d_in], brings a gemma_scope transcoder, which reads the normalised input without the norm's gain, to the
            MLP's input as it is; without it the transcoder says that it reads `ln2.hook_normalized`.

    Raises:
        ConfigError: (a ValueError) an argument is wrong.
        ValueError: a file is missing, cut short or says something impossible; it is named, never its folder.
    """
    module = _module(format)
    stored = module.read(Path(path), layer)
    weights, info, activation, top_k = stored.weights, stored.info, stored.activation, stored.top_k
    dict_size = len(weights["b_enc"]) if weights["b_enc"].ndim == 1 else 0
    groups, rest = (dict_size,), {}
    ours, tensors = _beside(module, folder_of(Path(path)), info.get("layer"))
    if ours.exists():
        config, info = transcoder_files.read_ours(ours)
        groups, top_k, activation = tuple(config["group_sizes"]), config["top_k"], config["activation"]
        rest = transcoder_files.read_tensors(tensors) if tensors.exists() else {}
        if "gain" in rest:
            weights["W_enc"] = conversion.with_gain(weights["W_enc"], rest["gain"], rest["W_enc"])
    elif gain is not None:
        if module is not gemma_scope or info.get("apply_rmsnorm_scaling", True):
            raise ConfigError("gain", "belongs to transcoders of Gemma Scope, which read their input without it")
        weights["W_enc"] = conversion.with_gain(weights["W_enc"], gain)
        info = {**info, "apply_rmsnorm_scaling": True}
    if "threshold" not in weights:
        weights["threshold"] = rest.get("threshold", zeros_for(weights))
    transcoder_files.check(weights, dict_size)
    shape = TranscoderShape(activation, top_k or min(dict_size, default_top_k(dict_size)), groups)
    return Transcoder(shape, weights, info)


def judged(transcoder: Transcoder, x: Tensor, y: Tensor, groups: int | None = None) -> HeldOut:
    """L0 and FVU on inputs x [N, d_in] and targets y [N, d_out]."""
    codes = transcoder.encode_sparse(x, groups)
    return HeldOut(len(codes) / len(x), compute_fvu(y, transcoder(x, groups)))


def _module(format: str) -> ModuleType:  # noqa: A002
    if format not in _FORMATS:
        raise ConfigError("format", f"{format!r} is none of {', '.join(FORMATS)}")
    return _FORMATS[format]


def _beside(module: ModuleType, folder: Path, layer: object) -> tuple[Path, Path]:
    """Our two files beside another tool's: a set of several layers has them for each."""
    stem = f"transcoder_layer_{layer}" if module is circuit_tracer else "transcoder"
    return folder / f"{stem}.json", folder / f"{stem}.safetensors"


def _write(module: ModuleType, transcoder: Transcoder, path: Path, gain: Tensor | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    rest = module.write(transcoder, path, gain)
    shape = transcoder.shape
    config = {"activation": shape.activation, "top_k": shape.top_k, "group_sizes": shape.group_sizes}
    ours, tensors = _beside(module, path, transcoder.info.get("layer"))
    transcoder_files.write_ours(ours, config, transcoder.info)
    if rest:
        save_file({name: tensor.cpu().contiguous() for name, tensor in rest.items()}, tensors)
