"""The configuration of an extension, with the field names and defaults of spec/004."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from peft import AdaLoraConfig, LoraConfig
from torch import nn

from services.residency.lenses import lora

Kind = Literal["lora", "layer", "hybrid"]
Variant = Literal["lora", "rslora", "dora", "adalora"]
Position = Literal["encoder", "decoder", "both"]

_NAME = re.compile(r"[a-z][a-z0-9_-]{2,62}")
_RESERVED = ("default", "base")


class ConfigInvalid(ValueError):
    """A configuration is contradictory or out of range; `violations` holds every (field, description)."""

    def __init__(self, violations: Iterable[tuple[str, str]]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{field}: {description}" for field, description in self.violations))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """One inserted layer; `ExtensionConfig` checks it."""

    position: Position = "encoder"
    """Stack that gets it, or both; a decoder-only model has only its decoder."""
    index: int | None = None
    """Number it has when it is inserted, at least 1; None for the end of the stack."""
    initialization_scale: float = 0.01
    """Factor on its output projections; 0 leaves the model's function exactly as it was."""
    mlp_width: int | None = None
    """Neurons of its MLP, at most the neighbour's: those that matter most are copied; None for all of them."""
    from_step: int = 0
    """Optimizer step before which training inserts it; 0 for layers that are there from the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionConfig:
    """How a base is extended; what does not apply to the kind is ignored. Valid once it exists.

    Raises:
        ConfigInvalid: names every field that is wrong.
    """

    lora_r: int = 16
    """Rank of each adapter, for adalora the rank it begins with; at least 1, at most that of the adapted matrices."""
    lora_alpha: float = 32
    """Scale of the adapter's output: alpha / r, or alpha / sqrt(r) for rslora."""
    lora_dropout: float = 0.1
    """Probability with which an input of the adapter is zeroed while training; 0 <= p < 1."""
    lora_target_modules: tuple[str, ...] = ()
    """Last parts of the paths of the linear modules to adapt; empty means PEFT's default for the model type."""
    lora_variant: Variant = "lora"
    """lora (arXiv:2106.09685), rslora (arXiv:2312.03732), dora (arXiv:2402.09353) or adalora (arXiv:2303.10512)."""
    lora_target_r: int | None = None
    """Mean rank that training prunes adalora's adapters to, below `lora_r`; half of it when None."""
    layer_position: Position = "encoder"
    """Stack of an encoder-decoder model that gets the layer; a decoder-only model has only its decoder."""
    layer_index: int | None = None
    """Number the inserted layer will have, at least 1; None for the end of the stack."""
    layer_initialization_scale: float = 0.01
    """Factor on the inserted layer's output projections; 0 leaves the model's function exactly as it was."""
    layers: tuple[LayerPlacement, ...] = ()
    """Several insertion points instead of the one above, in the order of insertion: upwards in each stack."""
    shared_layer_of: str = ""
    """Extension whose inserted layers a hybrid uses instead of its own; only the adapters are the hybrid's."""
    train_shared_layer: bool = False
    """Train the shared layers too, which changes every extension that shares them."""
    freeze_base: bool = True
    """Train the extension alone; False trains a copy that becomes a new model, never a shared base."""
    save_path: Path = Path("extensions")
    """Directory into which notebooks save, one folder per task."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_target_modules", tuple(self.lora_target_modules))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "save_path", Path(self.save_path))
        checks = (*self._adapter(), *self._layers(), *self._together())
        violations = [(name, description) for name, wrong, description in checks if wrong]
        if violations:
            raise ConfigInvalid(violations)

    @property
    def placements(self) -> tuple[LayerPlacement, ...]:
        """Every layer to insert, in order."""
        return self.layers or (
            LayerPlacement(
                position=self.layer_position,
                index=self.layer_index,
                initialization_scale=self.layer_initialization_scale,
            ),
        )

    def over_layers_of(self, other: str) -> ExtensionConfig:
        """The same over another extension's layers instead of its own."""
        defaults = ExtensionConfig.__dataclass_fields__
        own: dict[str, Any] = {name: defaults[name].default for name in _SINGLE_LAYER}
        return replace(self, shared_layer_of=other, layers=(), **own)

    @property
    def adalora_target(self) -> int:
        """`lora_target_r`, its default resolved."""
        return self.lora_target_r or self.lora_r // 2

    def _adapter(self) -> Iterable[tuple[str, bool, str]]:
        """(field, is wrong, what it must be) for every field of adapters."""
        yield "lora_r", self.lora_r < 1, f"must be at least 1, got {self.lora_r}"
        yield "lora_alpha", not self.lora_alpha > 0, f"must be above 0, got {self.lora_alpha}"
        yield "lora_dropout", not 0 <= self.lora_dropout < 1, f"must be in [0, 1), got {self.lora_dropout}"
        yield "lora_variant", self.lora_variant not in get_args(Variant), f"must be one of {get_args(Variant)}"
        repeated = len(set(self.lora_target_modules)) < len(self.lora_target_modules)
        yield "lora_target_modules", repeated or "" in self.lora_target_modules, "names must be distinct and not empty"
        adaptive, target = self.lora_variant == "adalora", self.lora_target_r
        yield "lora_target_r", target is not None and not adaptive, "belongs to variant adalora"
        yield (
            "lora_target_r",
            adaptive and target is not None and not 1 <= target < self.lora_r,
            f"must be 1 to {self.lora_r - 1}, below lora_r, got {target}",
        )
        yield "lora_r", adaptive and self.lora_r == 1, "must be at least 2 for adalora, which prunes ranks"

    def _layers(self) -> Iterable[tuple[str, bool, str]]:
        """The same for every field of inserted layers."""
        for number, layer in enumerate(self.placements):
            place = f"layers[{number}]." if self.layers else "layer_"
            yield place + "position", layer.position not in get_args(Position), f"must be one of {get_args(Position)}"
            wrong = layer.index is not None and layer.index < 1
            yield place + "index", wrong, f"must be 1 or more, got {layer.index}"
            scale = layer.initialization_scale
            yield place + "initialization_scale", not 0 <= scale <= 1, f"must be in [0, 1], got {scale}"
            wrong = layer.mlp_width is not None and layer.mlp_width < 1
            yield place + "mlp_width", wrong, f"must be 1 or more, got {layer.mlp_width}"
            earliest = self.placements[number - 1].from_step if number else 0
            wrong = layer.from_step < earliest or (number == 0 and layer.from_step != 0)
            yield (
                place + "from_step",
                wrong,
                f"must be {'0 for the first layer' if number == 0 else f'{earliest} or more'}, got {layer.from_step}",
            )

    def _together(self) -> Iterable[tuple[str, bool, str]]:
        """The same for fields that exclude each other."""
        single = ExtensionConfig.__dataclass_fields__
        own = [name for name in _SINGLE_LAYER if getattr(self, name) != single[name].default]
        yield "layers", bool(self.layers and own), f"takes the place of {', '.join(own)}; give one of them"
        shared = bool(self.shared_layer_of)
        yield "layers", bool(shared and (self.layers or own)), "are those of shared_layer_of; give one of them"
        yield "train_shared_layer", self.train_shared_layer and not shared, "needs shared_layer_of"
        yield "shared_layer_of", shared and not self.freeze_base, "goes with a frozen base: the layers belong to it"

    def targets(self, model: nn.Module) -> tuple[str, ...]:
        """The configured target modules, or the model type's default.

        Raises:
            ExtensionRefused: there is no default for this model type.
        """
        return self.lora_target_modules or lora.default_targets(model.config.model_type)

    def peft(self, model: nn.Module) -> LoraConfig:
        """PEFT's own configuration of the adapter on this model."""
        common: dict[str, Any] = {
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": sorted(self.targets(model)),
            "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        }
        config: LoraConfig
        if self.lora_variant == "adalora":  # its steps are unknown until it is trained: see compute.adalora
            config = AdaLoraConfig(init_r=self.lora_r, target_r=self.adalora_target, total_step=1, **common)
        else:
            rslora, dora = self.lora_variant == "rslora", self.lora_variant == "dora"
            config = LoraConfig(r=self.lora_r, use_rslora=rslora, use_dora=dora, **common)
        config.fan_in_fan_out = lora.stores_transposed(model, config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """What decides the extension's function, as plain JSON."""
        values = asdict(self)
        del values["save_path"]
        return values | {"lora_target_modules": list(self.lora_target_modules), "layers": list(values["layers"])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExtensionConfig:
        """What `as_dict` gave; fields that are not there have their defaults.

        Raises:
            ConfigInvalid: a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        layers = tuple(LayerPlacement(**layer) for layer in values.get("layers", ()))
        return cls(**{name: value for name, value in values.items() if name in known} | {"layers": layers})


_SINGLE_LAYER = ("layer_position", "layer_index", "layer_initialization_scale")


def require_task_name(name: str, module_paths: Iterable[str]) -> None:
    """Refuse names that PEFT confuses with its own or the model's parts when it writes keys (peft#3584, #2252).

    Args:
        name: the task's name.
        module_paths: dotted paths of the base's modules.

    Raises:
        ConfigInvalid: names `task_name`.
    """
    segments = {segment for path in module_paths for segment in path.split(".")}
    if not _NAME.fullmatch(name):
        reason = "must be 3 to 63 lower-case letters, digits, hyphens or underscores, a letter first"
    elif "lora" in name or name in _RESERVED:
        reason = f"must not contain 'lora' nor be one of {_RESERVED}"
    elif name in segments:
        reason = "is the name of a module of this model"
    else:
        return
    raise ConfigInvalid([("task_name", f"{reason}, got {name!r}")])
