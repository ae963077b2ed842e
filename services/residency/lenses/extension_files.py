"""An extension on disk: `extension.json`, `inserted.safetensors` for layers, and `lora/`, a folder plain PEFT loads.

The files depend on nothing but the extension's content, byte for byte, so that the folder's content digest is its
identity and its name an alias.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import takewhile
from os import link
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from transformers import PreTrainedModel

from services.residency.checkpoint import CheckpointError, read_header
from services.residency.lenses import lora
from services.residency.lenses.extension import (
    Extension,
    ExtensionRefused,
    Extensions,
    SharedLayers,
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
    inserted_digest: str = ""
    """blake3 of inserted.safetensors; extensions of one base that have the same share it, on disk and in memory."""
    layers_frozen: bool = False
    """The layers are another extension's, and training leaves them alone."""
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
    folder: Path,
    manifest: Manifest,
    weights: Mapping[str, torch.Tensor],
    adapter_config: Mapping[str, Any] | None,
    layers: Path | None = None,
) -> None:
    """Write an extension into an existing empty folder.

    Args:
        folder: where; a failure may leave files in it.
        manifest: goes to extension.json.
        weights: CPU tensors by checkpoint key.
        adapter_config: PEFT's configuration as JSON when the extension has an adapter.
        layers: another extension's inserted.safetensors to share, instead of layers among the weights.
    """
    adapter = {key: tensor for key, tensor in weights.items() if key.startswith(lora.KEY_PREFIX)}
    inserted = {key: tensor for key, tensor in weights.items() if key not in adapter}
    if adapter_config is not None:
        (folder / LORA_FOLDER).mkdir()
        _write_json(folder / LORA_FOLDER / "adapter_config.json", adapter_config)
        _write_tensors(folder / LORA_FOLDER / ADAPTER_FILE, adapter)
    if layers is not None:
        _share(layers, folder / INSERTED_FILE)
    elif inserted:
        _write_tensors(folder / INSERTED_FILE, inserted)
    digest = file_digest(folder / INSERTED_FILE) if (folder / INSERTED_FILE).exists() else ""
    _write_json(folder / "extension.json", asdict(replace(manifest, inserted_digest=digest)))


def file_digest(path: Path) -> str:
    """Hex blake3 of a file."""
    return blake3().update_mmap(path).hexdigest()


def _share(source: Path, target: Path) -> None:
    """The same file under a second name, so that the disk holds it once; a copy where the file systems differ."""
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def retrained(source: Path, extension: Extension, training: Mapping[str, Any]) -> Callable[[Path], None]:
    """The next version of an extension: its weights, its operations (training may insert layers), what was learnt.

    Args:
        source: folder of the version that was trained; frozen layers are shared with it.
        extension: its trained weights, copied at once.
        training: goes to the manifest.

    Returns:
        Writes the files into an empty folder while the source is there still.
    """
    manifest = read_manifest(source)
    operations = tuple(dict(operation) for operation in extension.operations)
    manifest = replace(manifest, operations=operations, training=dict(training))
    weights = {key: tensor for key, tensor in extension.state().items() if key not in extension.frozen}
    layers = source / INSERTED_FILE if manifest.layers_frozen else None
    config = _adapter_json(source)
    return lambda folder: write(folder, manifest, weights, config, layers)


def over_layers(source: Path, layers: Path) -> Callable[[Path], None]:
    """The next version of an extension over other weights of the layers that it shares, its adapter as it is.

    Args:
        source: folder of the extension.
        layers: the inserted.safetensors that another extension's training changed.

    Returns:
        Writes the files into an empty folder while both sources are there still.

    Raises:
        ExtensionRefused: the layers are of another shape.
    """
    manifest, config = read_manifest(source), _adapter_json(source)
    require_same_tensors(read_tensors(source / INSERTED_FILE), read_tensors(layers))
    weights = read_tensors(source / LORA_FOLDER / ADAPTER_FILE) if config is not None else {}
    return lambda folder: write(folder, manifest, weights, config, layers)


def _adapter_json(folder: Path) -> dict[str, Any] | None:
    path = folder / LORA_FOLDER / "adapter_config.json"
    return json.loads(path.read_text()) if path.exists() else None


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


def attachable(
    folder: Path, model: PreTrainedModel, *, base_digest: str = "", among: Extensions | None = None
) -> Extension:
    """Build the extension in a folder for a live base, strictly; the base is left as it was.

    Args:
        folder: as `write` left it.
        model: the base without extensions.
        base_digest: content digest of the base's files where it is known.
        among: where an extension with the same inserted layers may be attached already, whose layers are used then.
            What is attached for training must not share layers that the training changes.

    Raises:
        ExtensionRefused: see `read` and `assemble`.
    """
    manifest, weights, config = read(folder, model, base_digest=base_digest)
    insertions = _leading(manifest.operations)
    inserted = {key: tensor for key, tensor in weights.items() if not key.startswith(lora.KEY_PREFIX)}
    frozen = frozenset(inserted if manifest.layers_frozen else ())
    whole = len(insertions) == sum(operation["op"] == "insert" for operation in manifest.operations)
    if among is None or not insertions or not whole:
        return replace(assemble(model, manifest.operations, weights, config), frozen=frozen)
    layers = among.layers(manifest.inserted_digest) or assemble(model, insertions, inserted, None)
    extension = assemble(model, manifest.operations, weights, config, layers=layers)
    return replace(extension, frozen=frozen, layers=SharedLayers(manifest.inserted_digest, layers))


def _leading(operations: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The insertions that the operations begin with."""
    return list(takewhile(lambda operation: operation.get("op") == "insert", operations))


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
    if manifest.inserted_digest or (folder / INSERTED_FILE).is_file():
        weights |= read_tensors(folder / INSERTED_FILE)
        if manifest.inserted_digest not in ("", file_digest(folder / INSERTED_FILE)):
            raise ExtensionRefused("weights", f"{INSERTED_FILE} is not the file that was written")
    return manifest, weights, config


def assemble(
    model: PreTrainedModel,
    operations: Sequence[Mapping[str, Any]],
    weights: Mapping[str, torch.Tensor],
    config: LoraConfig | None,
    *,
    layers: Extension | None = None,
) -> Extension:
    """Build an extension for a live base, strictly; the base is left as it was.

    Args:
        model: the base; quantised or not.
        operations: what to do to it, in order.
        weights: tensors by checkpoint key, exactly those that the operations need; copied.
        config: PEFT's configuration for the operation `lora`.
        layers: what the first of the operations have made already.

    Raises:
        ExtensionRefused: an operation is unknown, or something does not fit the base.
    """
    whole = layers or Extension(edits=(), parameters={})
    for operation in operations[len(whole.operations) :]:
        try:
            build = OPERATIONS[operation["op"]]
            with applied(whole.edits):
                whole = whole.then(build(model, operation, weights, config))
        except KeyError as error:
            raise ExtensionRefused("operations", f"{operation} is not understood") from error
    require_same_tensors(whole.parameters, weights)
    return whole


def stored_bytes(folder: Path, among: Extensions) -> int:
    """Device memory that the extension in a folder will add, from its files' headers; no weight is read.

    Args:
        folder: as `write` left it.
        among: what is attached already; layers that are there are not added again.

    Raises:
        ExtensionRefused: a file is damaged.
    """
    adapter, inserted = folder / LORA_FOLDER / ADAPTER_FILE, folder / INSERTED_FILE
    there = among.layers(read_manifest(folder).inserted_digest) is not None
    try:
        size = sum(4 * entry.numel for entry in read_header(adapter)) if adapter.exists() else 0  # float32 always
        return size + (sum(entry.nbytes for entry in read_header(inserted)) if inserted.exists() and not there else 0)
    except (OSError, CheckpointError) as error:
        raise ExtensionRefused("weights", "are missing or damaged") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file of our own, mapped: nothing is read before it is used, and nothing is read twice.

    Raises:
        ExtensionRefused: the file is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExtensionRefused("weights", f"{path.name} is missing or damaged") from error


def _insert(
    model: PreTrainedModel, operation: Mapping[str, Any], weights: Mapping[str, torch.Tensor], config: LoraConfig | None
) -> Extension:
    del config
    width = operation.get("mlp_width")
    return insert(model, operation["position"], index=operation["index"], mlp_width=width, weights=weights)


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
