"""LoRA adapters as PEFT builds and stores them (Hu et al., arXiv:2106.09685), turned into edits of a live base.

PEFT replaces each targeted linear module by a wrapper that holds the original as `base_layer`. Here the wrappers are
taken out again as soon as PEFT has made them, and become the edits of an `Extension`: PEFT's own "disabled" state,
which leaves the wrappers in the base's tree and its paths renamed, is never used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from services.residency.lenses.extension import Edit, Extension, ExtensionRefused
from services.residency.quantize import linear_modules
from services.residency.weight_only import WeightOnlyLinear

ADAPTER = "lensmesh_task"
"""PEFT's name for the adapter inside its wrappers; a name of the user's could collide with a module path there."""
KEY_PREFIX = "base_model.model."
"""What PEFT puts before a module's path in adapter_model.safetensors."""
MAGNITUDE = "lora_magnitude_vector"
"""DoRA's norms of the adapted weights; PEFT leaves `.weight` off their keys."""
READ_FIELDS = frozenset(
    {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "fan_in_fan_out"}
)
ADALORA_FIELDS = frozenset({"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"}) | frozenset(
    {"orth_reg_weight", "total_step"}
)
"""Fields of an adapter_config.json that change the function and are understood here."""
IGNORED_FIELDS = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"init_lora_weights", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"}
)
"""Fields that say nothing about the trained function."""


def adaptable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Paths of the modules that LoRA can adapt, each with its (in_features, out_features).

    Every linear map, quantised or not; not the unembedding, which may be the embedding's own tensor.
    """
    return {path: _features(module) for path, module in linear_modules(model).items()}


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def default_targets(model_type: str) -> tuple[str, ...]:
    """The modules PEFT adapts in this kind of model when none are named (T5: q and v).

    Raises:
        ExtensionRefused: PEFT has no default for it.
    """
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if not isinstance(names, list):
        raise ExtensionRefused("lora.target_modules", f"name them: there is no default for model type {model_type!r}")
    return tuple(names)


def matched(linears: Mapping[str, tuple[int, int]], target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linear modules that the names select, by the last parts of their paths as in PEFT.

    Raises:
        ExtensionRefused: a name selects none; the description lists the names this model has.
    """
    chosen: dict[str, tuple[int, int]] = {}
    for name in target_modules:
        hits = {path: shape for path, shape in linears.items() if path == name or path.endswith(f".{name}")}
        if not hits:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise ExtensionRefused(
                "lora.target_modules", f"{name!r} is not a linear module of this model; it has {known}"
            )
        chosen |= hits
    return dict(sorted(chosen.items()))


def require_rank(targets: Mapping[str, tuple[int, int]], r: int) -> None:
    """A rank must be at least 1 and at most that of every adapted matrix.

    Raises:
        ExtensionRefused: it is not.
    """
    if r < 1:
        raise ExtensionRefused("lora.r", f"must be at least 1, got {r}")
    for path, (n_in, n_out) in targets.items():
        if r > min(n_in, n_out):
            raise ExtensionRefused("lora.r", f"{r} is above the rank of {path}, which is {min(n_in, n_out)}")


def rank(config: LoraConfig) -> int:
    """The rank of the adapter's matrices."""
    return config.init_r if isinstance(config, AdaLoraConfig) else config.r


def fresh_triplets(targets: Mapping[str, tuple[int, int]], r: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a new AdaLoRA adapter as PEFT draws them (arXiv:2303.10512, section 3.1): it changes nothing yet.

    Returns:
        float32 tensors by checkpoint key: `lora_A` [r, in] and `lora_B` [out, r] normal with deviation 0.02, the
        singular values `lora_E` [r, 1] zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for path, (n_in, n_out) in targets.items():
        weights[f"{KEY_PREFIX}{path}.lora_A"] = 0.02 * torch.randn(r, n_in, generator=generator)
        weights[f"{KEY_PREFIX}{path}.lora_B"] = 0.02 * torch.randn(n_out, r, generator=generator)
        weights[f"{KEY_PREFIX}{path}.lora_E"] = torch.zeros(r, 1)
    return weights


def fresh_weights(targets: Mapping[str, tuple[int, int]], r: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a new adapter: A uniform in ±1/sqrt(in) as PEFT draws it, B zero, so that it changes nothing yet.

    Returns:
        float32 tensors by checkpoint key, `lora_A` [r, in] and `lora_B` [out, r]; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for path, (n_in, n_out) in targets.items():
        bound = n_in**-0.5
        uniform = torch.rand(r, n_in, generator=generator)
        weights[f"{KEY_PREFIX}{path}.lora_A.weight"] = (2 * uniform - 1) * bound
        weights[f"{KEY_PREFIX}{path}.lora_B.weight"] = torch.zeros(n_out, r)
    return weights


def read_config(folder: Path) -> LoraConfig:
    """The adapter_config.json of a PEFT folder.

    Raises:
        ExtensionRefused: it is no LoRA, or sets something that is not understood here.
        OSError: the file cannot be read.
    """
    try:
        stored = json.loads((folder / "adapter_config.json").read_text())
        peft_type = stored.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ExtensionRefused("adapter_config", "is not a JSON object") from error
    if peft_type not in ("LORA", "ADALORA"):
        raise ExtensionRefused("adapter_config.peft_type", f"must be LORA or ADALORA, got {peft_type!r}")
    adaptive = peft_type == "ADALORA"
    read = READ_FIELDS | (ADALORA_FIELDS if adaptive else frozenset())
    default = AdaLoraConfig(total_step=1) if adaptive else LoraConfig()
    for name, value in stored.items():
        if name not in read | IGNORED_FIELDS and value != getattr(default, name, None):
            raise ExtensionRefused(f"adapter_config.{name}", "is set, but not supported")
    if adaptive:
        stored["r"] = default.r  # PEFT's AdaLoRA has no use for it
    try:
        return type(default)(**{name: stored[name] for name in read & stored.keys()})
    except (TypeError, ValueError) as error:
        raise ExtensionRefused("adapter_config", "is contradictory") from error


def config_json(config: LoraConfig) -> dict[str, Any]:
    """What adapter_config.json holds: plain JSON, in an order that depends on nothing but the values."""
    kind = "ADALORA" if isinstance(config, AdaLoraConfig) else "LORA"
    stored = config.to_dict() | {"peft_type": kind, "inference_mode": True, "peft_version": None}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(stored.items())}


def build(
    model: nn.Module, config: LoraConfig, weights: Mapping[str, torch.Tensor], *, fresh: bool = False
) -> Extension:
    """Make an adapter for a live base, which is left as it was and must have no extension active.

    Args:
        model: the base; its linear modules may be bitsandbytes' int8 or int4.
        config: PEFT's configuration with explicit `target_modules`.
        weights: tensors by checkpoint key, exactly those the configuration asks for; copied.
        fresh: DoRA's magnitudes may be left out: they begin as the norms of the base's weights.

    Raises:
        ExtensionRefused: targets, rank, keys or shapes do not fit this model.
    """
    _require_trainable_int4(model)
    targets = matched(adaptable(model), sorted(config.target_modules or ()))
    require_rank(targets, rank(config))
    if config.use_dora:
        _require_readable(model, targets)
    extension = _inject(model, config)
    begun = {key: parameter for key, parameter in extension.parameters.items() if fresh and key.endswith(MAGNITUDE)}
    extension.load({**begun, **weights})
    return extension


def stores_transposed(model: nn.Module, config: LoraConfig) -> bool:
    """Whether the adapted modules keep their weight as [in, out] (GPT-2's Conv1D; its quantised layers do not)."""
    targets = matched(adaptable(model), sorted(config.target_modules or ()))
    return any(isinstance(model.get_submodule(path), Conv1D) for path in targets)


def _require_trainable_int4(model: nn.Module) -> None:
    """The repacking of bitsandbytes for avx512_bf16 is lossy and gives adapters no gradient, without a word."""
    for path, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu":
            raise ExtensionRefused(
                "base", f"{path} is int4 with support_avx512bf16_for_cpu set; unset it after loading"
            )


def _require_readable(model: nn.Module, targets: Iterable[str]) -> None:
    """To read an int8 weight on a CPU, PEFT moves it in place, after which the base cannot run any more."""
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, WeightOnlyLinear):
            raise ExtensionRefused("lora.variant", "dora cannot read the weights of this device's quantised bases")
        weight = module.weight
        if weight.dtype == torch.int8 and weight.device.type == "cpu":
            raise ExtensionRefused("lora.variant", "dora cannot read the weights of an int8 base on the CPU")


def _inject(model: nn.Module, config: LoraConfig) -> Extension:
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    edits: list[Edit] = []
    parameters: dict[str, nn.Parameter] = {}
    constants: list[torch.Tensor] = []
    injected = copy(config)
    injected.fan_in_fan_out = stores_transposed(model, config)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), _known_as_quantized(model):
        try:
            inject_adapter_in_model(injected, model, ADAPTER)
        finally:
            for path, wrapper in _wrappers(model).items():
                parent_path, _, name = path.rpartition(".")
                parent = model.get_submodule(parent_path)
                edits.append(Edit(parent, name, wrapper))
                for own in _own_parameters(wrapper).values():
                    own.data = own.data.float()  # as plain PEFT does: half precision learns badly
                constants += (p for p in _own_parameters(wrapper).values() if not p.requires_grad)
                parameters |= {
                    f"{KEY_PREFIX}{path}.{key}": p for key, p in _own_parameters(wrapper).items() if p.requires_grad
                }
                setattr(parent, name, wrapper.get_base_layer())
            if hasattr(model, "peft_config"):
                del model.peft_config
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
    return Extension(tuple(edits), parameters, operations=({"op": "lora"},), constants=tuple(constants))


@contextmanager
def _known_as_quantized(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has the mark by which PEFT chooses its wrappers for bitsandbytes' modules."""
    classes = {type(module).__name__ for module in model.modules()}
    marks = {"is_loaded_in_8bit": "Linear8bitLt" in classes, "is_loaded_in_4bit": "Linear4bit" in classes}
    before = {name: getattr(model, name) for name in marks if hasattr(model, name)}
    try:
        for name, mark in marks.items():
            setattr(model, name, mark)
        yield
    finally:
        for name in marks:
            delattr(model, name)
        for name, mark in before.items():
            setattr(model, name, mark)


def _wrappers(model: nn.Module) -> dict[str, LoraLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _own_parameters(wrapper: LoraLayer) -> dict[str, nn.Parameter]:
    """A wrapper's parameters by the end of the key that PEFT writes: without the adapter's name."""
    return {
        name.replace(f".{ADAPTER}", "").replace(f"{MAGNITUDE}.weight", MAGNITUDE): parameter
        for name, parameter in wrapper.named_parameters()
        if not name.startswith("base_layer.")
    }
