"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a TopK transcoder of equal widths with or without skip path.

It reads and predicts a module, `layers.3.mlp`: on families that normalise the MLP's output (Gemma-2) its target is
another tensor than `mlp_out`.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder
from services.residency.lenses.transcoder_files import read_json, read_tensors, write_json
from services.training.compute.config import ConfigError
from services.training.compute.formats.stored import Stored, layer_in, number, points, taken

ACTIVATIONS = ("topk",)
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def write(transcoder: Transcoder, path: Path, gain: Tensor | None) -> dict[str, Tensor]:
    """A folder that `SparseCoder.load_from_disk` reads.

    Raises:
        ConfigError: input and output differ in width.
    """
    if transcoder.d_in != transcoder.d_out:
        raise ConfigError("format", f"sparsify has one width, not {transcoder.d_in} and {transcoder.d_out}")
    tensors = {
        "encoder.weight": transcoder.W_enc.T,
        "encoder.bias": transcoder.b_enc,
        "W_dec": transcoder.W_dec,
        "b_dec": transcoder.b_dec,
    }
    if transcoder.W_skip is not None:
        tensors["W_skip"] = transcoder.W_skip
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)
    config = {
        "activation": "topk",
        "d_in": transcoder.d_in,
        "expansion_factor": max(1, transcoder.dict_size // transcoder.d_in),
        "k": transcoder.shape.top_k,
        "multi_topk": False,
        "normalize_decoder": False,
        "num_latents": transcoder.dict_size,
        "skip_connection": transcoder.W_skip is not None,
        "transcode": True,
    }
    write_json(path / CONFIG, config)
    return {"threshold": transcoder.threshold}


def read(path: Path, layer: int | None) -> Stored:
    """A hook point's folder; its name says the layer where `layer` does not.

    Raises:
        ValueError: it is no transcoder, or does not select the k largest of every row.
    """
    config = read_json(path / CONFIG)
    if not config.get("transcode"):
        raise ValueError(f"{CONFIG}: transcode is not set: this is an autoencoder")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{CONFIG}: activation {config['activation']!r}, only 'topk' can be read")
    names = _NAMES | ({"W_skip": "W_skip"} if config.get("skip_connection") else {})
    weights = taken(read_tensors(path / WEIGHTS), WEIGHTS, names)
    weights["W_enc"] = weights["W_enc"].T
    layer = layer_in(path.name) if layer is None else layer
    info = points(layer, "mlp.hook_in", "mlp.hook_out")
    return Stored(weights, "topk", number(config, CONFIG, "k"), info)
