"""An extension on disk: `extension.json`, `inserted.safetensors` for layers, and `lora/`, a folder plain PEFT loads.

The files depend on nothing but the extension's content, byte for byte, so that the folder's content digest is its
identity and its name an alias.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers import PreTrainedModel

from services.residency.lenses import lora
from services.residency.lenses.extension import (
    Extension,
    ExtensionRefused,
    applied,
    require_same_tensors,
)
from services.residency.lenses.inserted import insert

FORMAT = 1
LORA_FOLDER = "lora"
INSERTED_FILE = "inserted.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What extension.json says."""

    kind: str
    """lora, layer or hybrid."""
    task_name: str
    """Name its owner gave it; an alias, never an identity."""
    operations: tuple[dict[str, Any], ...]
    """What to do to the base, in order; each has `op` and what that operation needs."""
    base_structure: str
    """`structure` of the base it was made for."""
    base_digest: str = ""
    """Content digest of the base's files; empty when it was made from a model in memory."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration it was created with."""
    parameter_counts: dict[str, float] = field(default_factory=dict)
    """Exact counts: base, trainable, lora, layer, trainable_over_base, trainable_over_total."""
    training: dict[str, Any] = field(default_factory=dict)
    """Steps, tokens, held-out loss before and after; empty while it is as it was created."""
    format: int = FORMAT
    """Version of this layout."""


def structure(model: PreTrainedModel) -> str:
    """A digest of the shapes of the model's embedding and linear modules; the same for every quantisation of it."""
    lines = [f"{path} {n_in} {n_out}" for path, (n_in, n_out) in sorted(lora.adaptable(model).items())]
    embedding = model.get_input_embeddings()
    lines.append(f"embedding {embedding.num_embeddings} {embedding.embedding_dim}")
    return blake3("\n".join(lines).encode()).hexdigest()


def write(
    folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], adapter_config: Mapping[str, Any] | None
) -> None:
    """Write an extension into an existing empty folder.

    Args:
        folder: where; a failure may leave files in it.
        manifest: goes to extension.json.
        weights: CPU tensors by checkpoint key.
        adapter_config: PEFT's configuration as JSON when the extension has an adapter.
    """
    adapter = {key: tensor for key, tensor in weights.items() if key.startswith(lora.KEY_PREFIX)}
    inserted = {key: tensor for key, tensor in weights.items() if key not in adapter}
    _write_json(folder / "extension.json", asdict(manifest))
    if adapter_config is not None:
        (folder / LORA_FOLDER).mkdir()
        _write_json(folder / LORA_FOLDER / "adapter_config.json", adapter_config)
        _write_tensors(folder / LORA_FOLDER / ADAPTER_FILE, adapter)
    if inserted:
        _write_tensors(folder / INSERTED_FILE, inserted)


def retrained(source: Path, extension: Extension, training: Mapping[str, Any]) -> Callable[[Path], None]:
    """The next version of an extension: the same but for its weights and what is said of the training.

    Args:
        source: folder of the version that was trained.
        extension: its trained weights, copied at once.
        training: goes to the manifest.

    Returns:
        Writes the files into an empty folder; needs neither the extension nor the source any more.
    """
    manifest = replace(read_manifest(source), training=dict(training))
    weights = extension.state()
    adapter = source / LORA_FOLDER / "adapter_config.json"
    config = json.loads(adapter.read_text()) if adapter.exists() else None
    return lambda folder: write(folder, manifest, weights, config)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an extension's folder.

    Raises:
        ExtensionRefused: it is missing, is not one of ours, or of a later format.
    """
    try:
        stored = json.loads((folder / "extension.json").read_text())
        known = {entry.name for entry in fields(Manifest)}
        if set(stored) - known or stored["format"] != FORMAT:
            raise ExtensionRefused("extension.json", f"is not of format {FORMAT}")
        return Manifest(**stored | {"operations": tuple(stored["operations"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ExtensionRefused):
            raise
        raise ExtensionRefused("extension.json", "is missing or damaged") from error


def attachable(folder: Path, model: PreTrainedModel, *, base_digest: str = "") -> Extension:
    """Build the extension in a folder for a live base, strictly; the base is left as it was.

    Raises:
        ExtensionRefused: see `read` and `assemble`.
    """
    manifest, weights, config = read(folder, model, base_digest=base_digest)
    return assemble(model, manifest.operations, weights, config)


def read(
    folder: Path, model: PreTrainedModel, *, base_digest: str = ""
) -> tuple[Manifest, dict[str, torch.Tensor], LoraConfig | None]:
    """Manifest, weights and, where there is an adapter, PEFT's configuration of an extension made for this base.

    Args:
        folder: as `write` left it.
        model: the base without extensions; quantised or not.
        base_digest: content digest of the base's files where it is known.

    Raises:
        ExtensionRefused: the base is another one, or files are missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest.base_digest and base_digest and manifest.base_digest != base_digest:
        raise ExtensionRefused("base_digest", f"made for {manifest.base_digest}, this base is {base_digest}")
    if manifest.base_structure != structure(model):
        raise ExtensionRefused("base", "has other layers than the model this extension was made for")
    config: LoraConfig | None = None
    weights: dict[str, torch.Tensor] = {}
    if (folder / LORA_FOLDER).is_dir():
        config = lora.read_config(folder / LORA_FOLDER)
        weights |= read_tensors(folder / LORA_FOLDER / ADAPTER_FILE)
    if (folder / INSERTED_FILE).is_file():
        weights |= read_tensors(folder / INSERTED_FILE)
    return manifest, weights, config


def assemble(
    model: PreTrainedModel,
    operations: Sequence[Mapping[str, Any]],
    weights: Mapping[str, torch.Tensor],
    config: LoraConfig | None,
) -> Extension:
    """Build an extension for a live base, strictly; the base is left as it was.

    Args:
        model: the base; quantised or not.
        operations: what to do to it, in order.
        weights: tensors by checkpoint key, exactly those that the operations need; copied.
        config: PEFT's configuration for the operation `lora`.

    Raises:
        ExtensionRefused: an operation is unknown, or something does not fit the base.
    """
    whole = Extension(edits=(), parameters={})
    for operation in operations:
        try:
            build = OPERATIONS[operation["op"]]
            with applied(whole.edits):
                whole = whole.then(build(model, operation, weights, config))
        except KeyError as error:
            raise ExtensionRefused("operations", f"{operation} is not understood") from error
    require_same_tensors(whole.parameters, weights)
    return whole


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file in private memory (a map of the file would fault when it is truncated).

    Raises:
        ExtensionRefused: the file is missing, truncated or no safetensors file.
    """
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ExtensionRefused("weights", f"{path.name} is missing or damaged") from error


def _insert(
    model: PreTrainedModel, operation: Mapping[str, Any], weights: Mapping[str, torch.Tensor], config: LoraConfig | None
) -> Extension:
    del config
    return insert(model, operation["position"], index=operation["index"], weights=weights)


def _adapt(
    model: PreTrainedModel, operation: Mapping[str, Any], weights: Mapping[str, torch.Tensor], config: LoraConfig | None
) -> Extension:
    del operation
    if config is None:
        raise ExtensionRefused("adapter_config", "is missing")
    own = {key: tensor for key, tensor in weights.items() if key.startswith(lora.KEY_PREFIX)}
    return lora.build(model, config, own)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.write_bytes(save_tensors({key: tensors[key].contiguous() for key in sorted(tensors)}))


Build = Callable[
    [PreTrainedModel, Mapping[str, Any], Mapping[str, torch.Tensor], LoraConfig | None],
    Extension,
]
OPERATIONS: Mapping[str, Build] = {"insert": _insert, "lora": _adapt}
"""How each operation of a manifest becomes edits of a live model."""
