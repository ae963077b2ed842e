"""Extensions from and for others: PEFT adapter folders in, folders or zip archives that plain PEFT loads out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from peft import LoraConfig
from transformers import PreTrainedModel

from services.extensions.compute.config import ConfigInvalid, ExtensionConfig, Variant, require_task_name
from services.extensions.compute.count import ParameterCounts
from services.residency.lenses import lora
from services.residency.lenses.extension import ExtensionRefused
from services.residency.lenses.extension_files import (
    ADAPTER_FILE,
    INSERTED_FILE,
    LORA_FOLDER,
    Manifest,
    read_manifest,
    read_tensors,
    structure,
    write,
)

CONFIG_FILE = "adapter_config.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def import_adapter(
    folder: Path, model: PreTrainedModel, task_name: str, *, base_parameters: int, base_digest: str = ""
) -> tuple[ExtensionConfig, ParameterCounts, Callable[[Path], None]]:
    """Read a PEFT adapter strictly as an extension of kind lora; nothing that would change its function is dropped.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        model: the bare base it is for, or its skeleton unless it is DoRA.
        task_name: the extension's.
        base_parameters: the base's own count.
        base_digest: content digest of the base's files.

    Returns:
        Its configuration, its counts, and what writes our files into an empty folder.

    Raises:
        ConfigInvalid: the task's name is not usable.
        ExtensionRefused: a file is missing or damaged, a setting is not supported, or tensors do not fit the base.
    """
    require_task_name(task_name, (path for path, _ in model.named_modules()))
    try:
        adapter = lora.read_config(folder)
    except OSError as error:
        raise ExtensionRefused("adapter_config", f"{CONFIG_FILE} is missing") from error
    if not (folder / ADAPTER_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ExtensionRefused("weights", f"{ADAPTER_FILE} is missing, and pickled weights are not read")
    weights = {key: tensor.clone() for key, tensor in read_tensors(folder / ADAPTER_FILE).items()}
    adapter.target_modules = _named(model, adapter)
    adapter.fan_in_fan_out = lora.stores_transposed(model, adapter)
    config = _config(adapter)
    extension = lora.build(model, adapter, weights)
    counts = ParameterCounts(base_parameters, sum(p.numel() for p in extension.parameters.values()), layer=0)
    manifest = Manifest(
        kind="lora",
        task_name=task_name,
        operations=({"op": "lora"},),
        base_structure=structure(model),
        base_digest=base_digest,
        config=config.as_dict(),
        parameter_counts=counts.as_dict(),
    )
    return config, counts, lambda target: write(target, manifest, weights, lora.config_json(adapter))


def export(folder: Path, target: Path, *, base_model: str = "") -> Path:
    """Copy an extension for others.

    Adapters alone lie where plain PEFT looks for them, beside our extension.json. With inserted layers PEFT's folder is
    `lora/`: it fits the model that has the layers.

    Args:
        folder: the extension.
        target: a new folder, or a new file that ends in `.zip`.
        base_model: what PEFT shall load as the base; an identifier or a path.

    Raises:
        FileExistsError: the target exists.
        ExtensionRefused: the folder is damaged.
    """
    kind = read_manifest(folder).kind
    prefix = "" if kind == "lora" else f"{LORA_FOLDER}/"
    files = {"extension.json": folder / "extension.json", INSERTED_FILE: folder / INSERTED_FILE}
    files[prefix + ADAPTER_FILE] = folder / LORA_FOLDER / ADAPTER_FILE
    contents = {name: path for name, path in files.items() if path.exists()}
    adapter = folder / LORA_FOLDER / CONFIG_FILE
    described = {}
    if adapter.exists():
        stored = json.loads(adapter.read_text()) | {"base_model_name_or_path": base_model or None}
        described[prefix + CONFIG_FILE] = json.dumps(stored, indent=2, sort_keys=True).encode()
    if target.suffix == ".zip":
        _write_zip(target, contents, described)
    else:
        _write_folder(target, contents, described)
    return target


def _write_folder(target: Path, contents: dict[str, Path], described: dict[str, bytes]) -> None:
    target.mkdir(parents=True)
    for name, path in contents.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    for name, text in described.items():
        (target / name).write_bytes(text)


def _write_zip(target: Path, contents: dict[str, Path], described: dict[str, bytes]) -> None:
    """Uncompressed, which weights hardly are, and the same bytes every time."""
    with ZipFile(target, "x") as archive:
        for name, path in contents.items():
            with path.open("rb") as source, archive.open(ZipInfo(name, _EPOCH), "w", force_zip64=True) as out:
                shutil.copyfileobj(source, out, 1 << 20)
        for name, text in described.items():
            archive.writestr(ZipInfo(name, _EPOCH), text)


def _named(model: PreTrainedModel, adapter: LoraConfig) -> set[str]:
    """The names of the adapted modules; PEFT takes a regular expression for whole paths too."""
    wanted = adapter.target_modules
    if not isinstance(wanted, str):
        return set(wanted or ())
    try:
        paths = {path for path in lora.adaptable(model) if re.fullmatch(wanted, path)}
    except re.error as error:
        raise ExtensionRefused("adapter_config.target_modules", "is no regular expression") from error
    if not paths:
        raise ExtensionRefused("adapter_config.target_modules", f"{wanted[:100]!r} matches no linear module")
    return paths


def _config(adapter: LoraConfig) -> ExtensionConfig:
    variant: Variant = "dora" if adapter.use_dora else "rslora" if adapter.use_rslora else "lora"
    if adapter.use_dora and adapter.use_rslora:
        raise ExtensionRefused("adapter_config.use_rslora", "goes not with use_dora here")
    target_r = None
    if adapter.peft_type == "ADALORA":
        variant, target_r = "adalora", adapter.target_r
    try:
        return ExtensionConfig(
            lora_r=lora.rank(adapter),
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            lora_target_modules=tuple(sorted(adapter.target_modules or ())),
            lora_variant=variant,
            lora_target_r=target_r,
        )
    except ConfigInvalid as error:
        field, description = error.violations[0]
        raise ExtensionRefused(f"adapter_config.{field}", description) from error
