"""Bring a model from a directory of safetensors into memory, tensor by tensor; a failure leaves nothing behind."""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from services.residency.checkpoint import Entry, read_header, read_headers, read_tensors
from services.residency.families import UnsupportedModel
from services.residency.quantize import CAST, linear_modules, put_back, replace_linear

_LEGACY_NAMES = {"gamma": "weight", "beta": "bias"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PART = ":"
"""Between the path of a quantised module and the name of its part, in files that `fill` reads as `quantized`."""
Progress = Callable[[int, int], None]
"""Told (bytes read, bytes in all); what it raises ends the load."""
Where = Callable[[str], str]
"""The torch device of a tensor or module by its path in the model."""


class LoadFailed(ValueError):
    """The model cannot be loaded from these files; nothing of it stays in memory."""


def read_config(directory: Path) -> PretrainedConfig:
    """The model's configuration. Code that comes with a checkpoint is never run.

    Raises:
        LoadFailed: there is none, or transformers does not know its `model_type`.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed("config.json is missing, not valid, or of a type that transformers does not know") from error


def config_of(stored: Mapping[str, object]) -> PretrainedConfig:
    """The configuration behind a config.json's content.

    Raises:
        LoadFailed: transformers does not know its `model_type`, or a value is not valid.
    """
    values = {name: value for name, value in stored.items() if name not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(str(stored.get("model_type")), **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed("config.json is not valid, or of a type that transformers does not know") from error


class _LayingOut(threading.local):
    """Whether this thread makes modules without memory. accelerate's `init_empty_weights` does so for every thread."""

    active = False


_laying_out = _LayingOut()


def _without_memory(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if not _laying_out.active or parameter is None or parameter.is_meta:
        return None
    laid_out = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    laid_out._is_hf_initialized = True  # transformers then draws no first weights for it
    return laid_out


register_module_parameter_registration_hook(_without_memory)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    _laying_out.active = True
    try:
        yield
    finally:
        _laying_out.active = False


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree on the meta device: no memory for parameters; buffers are real. Any thread may do this.

    Raises:
        UnsupportedModel: transformers has no language model of this type.
    """
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with _parameters_on_meta():  # float32, because transformers would set another dtype as every thread's default
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(f"transformers has no language model of type {config.model_type!r}") from error
    model.config.dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def stored_dtype(entries: list[Entry]) -> torch.dtype:
    """The floating dtype that holds most of the checkpoint's elements; float32 if it holds none."""
    numel: dict[torch.dtype, int] = {torch.float32: 0}
    for entry in entries:
        if entry.dtype.is_floating_point:
            numel[entry.dtype] = numel.get(entry.dtype, 0) + entry.numel
    return max(numel, key=lambda dtype: numel[dtype])


def target_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Parameter name to dtype: float32 where transformers says that half precision overflows (T5's `wo`)."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype in CAST.values() else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not kept:
        return lambda _: dtype
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(kept)))
    return lambda name: torch.float32 if pattern.search(name) else dtype


def assign_names(model: PreTrainedModel, entries: list[Entry]) -> dict[str, Entry]:
    """Which stored tensor is which parameter or persistent buffer.

    Checkpoints of the bare transformer lack the base model's prefix, old ones call norm weights gamma and beta; tensors
    that the model has no place for (GPT-2's saved causal masks) are left out.

    Raises:
        LoadFailed: a shape differs.
    """
    wanted: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    prefix = f"{model.base_model_prefix}."
    assigned: dict[str, Entry] = {}
    for entry in entries:
        head, _, leaf = entry.name.rpartition(".")
        name = f"{head}.{_LEGACY_NAMES[leaf]}" if leaf in _LEGACY_NAMES and entry.name not in wanted else entry.name
        place = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in wanted), None)
        if place is None:
            continue
        if tuple(wanted[place].shape) != entry.shape:
            raise LoadFailed(f"{place} is {list(wanted[place].shape)} by the config, {list(entry.shape)} in the file")
        assigned[place] = entry
    return assigned


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint, by name."""
    found = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent_path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_path)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is laid out but holds no weights yet; what `fill` needs."""

    model: PreTrainedModel
    directory: Path
    quantization: str
    dtype: torch.dtype
    entries: list[Entry]
    """Every tensor of the files."""
    assigned: Mapping[str, Entry]
    """Those that the model has a place for, by its names."""


def prepare(directory: Path, quantization: str) -> Prepared:
    """Read config and headers and lay the modules out on the meta device. Any thread may do this.

    Args:
        directory: config.json and safetensors files.
        quantization: `none` keeps the checkpoint's dtype, `fp16` and `bf16` convert, `int8` and `int4` quantise.

    Raises:
        LoadFailed, CheckpointError, UnsupportedModel: the files or the model are not right.
        OSError: a file cannot be read.
    """
    config = read_config(directory)
    entries = read_headers(directory)
    dtype = CAST.get(quantization) or stored_dtype(entries)
    model = skeleton(config, dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return Prepared(model, directory, quantization, dtype, entries, assign_names(model, entries))


def fill(prepared: Prepared, device: str | Where, progress: Progress, quantized: Path | None = None) -> PreTrainedModel:
    """Read the weights; each is converted or quantised and placed before the next is read. Any thread may do this.

    Args:
        prepared: not used again afterwards.
        device: torch device of the weights, or of each by its name.
        progress: see `Progress`; called at least every 5 % of the bytes.
        quantized: the same weights as `DiskCache` kept them, read instead of the model's own files.

    Raises:
        LoadFailed, CheckpointError: the files are truncated or incomplete.
        OSError: a file cannot be read.
        MemoryError, torch.OutOfMemoryError: it does not fit.
    """
    model = prepared.model
    where: Where = (lambda _: device) if isinstance(device, str) else device
    placed = _read_quantized(prepared, where, progress, quantized) if quantized else _read(prepared, where, progress)
    missing = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in placed}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    _require_complete(model)
    for path, buffer in list(model.named_buffers()):
        _place(model, path, buffer.to(where(path)))
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    return model.eval()


def _read(prepared: Prepared, where: Where, progress: Progress) -> set[str]:
    """Place the stored weights, converted or quantised; the names that have theirs now."""
    model = prepared.model
    quantized = linear_modules(model) if prepared.quantization in ("int8", "int4") else {}
    dtype_of = target_dtypes(model, prepared.dtype)
    for names, tensor in _stored(prepared, progress):
        for name in names:
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in quantized:
                form = {"quantization": prepared.quantization, "dtype": prepared.dtype, "device": where(path)}
                replace_linear(model, path, tensor, **form)
            else:
                wanted = dtype_of(name) if tensor.is_floating_point() else tensor.dtype
                _place(model, name, tensor.to(device=where(name), dtype=wanted))
    return set(prepared.assigned)


def _read_quantized(prepared: Prepared, where: Where, progress: Progress, file: Path) -> set[str]:
    """Place weights that were quantised before; the names that have theirs now."""
    model, entries = prepared.model, read_header(file)
    wanted = Counter(entry.name.partition(PART)[0] for entry in entries if PART in entry.name)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for entry, tensor in read_tensors(file.parent, entries, _adding_up(entries, progress)):
        path, _, part = entry.name.partition(PART)
        if not part:
            _place(model, path, tensor.to(where(path)))
            continue
        parts[path][part] = tensor
        if len(parts[path]) == wanted[path]:
            form = {"quantization": prepared.quantization, "dtype": prepared.dtype, "device": where(path)}
            put_back(model, path, parts.pop(path), **form)
    return {entry.name for entry in entries if PART not in entry.name} | {f"{path}.weight" for path in wanted}


def _stored(prepared: Prepared, progress: Progress) -> Iterator[tuple[list[str], Tensor]]:
    """Each stored tensor once, in the order of the files, with the names of the parameters that it is."""
    names: dict[str, list[str]] = {}
    for name, entry in prepared.assigned.items():
        names.setdefault(entry.name, []).append(name)
    entries = list({entry.name: entry for entry in prepared.assigned.values()}.values())
    for entry, tensor in read_tensors(prepared.directory, entries, _adding_up(entries, progress)):
        yield names[entry.name], tensor


def _adding_up(entries: list[Entry], progress: Progress) -> Callable[[int], None]:
    """Takes how many more bytes of the entries were read, and tells how many those are by then."""
    done, total = 0, sum(entry.nbytes for entry in entries)

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return count


def load_model(
    directory: Path, quantization: str, device: str = "cpu", progress: Progress = lambda done, total: None
) -> PreTrainedModel:
    """`prepare` and `fill` in one: a model from a local directory, in eval mode, every parameter frozen.

    Raises:
        LoadFailed, CheckpointError, UnsupportedModel: the files or the model are not right.
        OSError: a file cannot be read.
        MemoryError, torch.OutOfMemoryError: it does not fit.
    """
    return fill(prepare(directory, quantization), device, progress)


def _require_complete(model: nn.Module) -> None:
    empty = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if empty:
        raise LoadFailed(f"{len(empty)} tensors are not in the files, the first is {empty[0]}")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None where there is none. Code that comes with it is never run."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed("the tokenizer's files are not valid") from error
