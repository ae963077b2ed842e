"""The configuration of an extension, with the field names and defaults of spec/004."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peft import LoraConfig
from torch import nn

from services.residency.lenses import lora

Kind = Literal["lora", "layer", "hybrid"]
Variant = Literal["lora", "rslora", "dora"]
Position = Literal["encoder", "decoder", "both"]

_NAME = re.compile(r"[a-z][a-z0-9_-]{2,62}")
_RESERVED = ("default", "base")


class ConfigInvalid(ValueError):
    """A configuration is contradictory or out of range; `violations` holds every (field, description)."""

    def __init__(self, violations: Iterable[tuple[str, str]]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{field}: {description}" for field, description in self.violations))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionConfig:
    """How a base is extended; what does not apply to the kind is ignored. Valid once it exists.

    Raises:
        ConfigInvalid: names every field that is wrong.
    """

    lora_r: int = 16
    """Rank of each adapter; at least 1 and at most the rank of the adapted matrices."""
    lora_alpha: float = 32
    """Scale of the adapter's output: alpha / r, or alpha / sqrt(r) for rslora."""
    lora_dropout: float = 0.1
    """Probability with which an input of the adapter is zeroed while training; 0 <= p < 1."""
    lora_target_modules: tuple[str, ...] = ()
    """Last parts of the paths of the linear modules to adapt; empty means PEFT's default for the model type."""
    lora_variant: Variant = "lora"
    """lora (arXiv:2106.09685), rslora (arXiv:2312.03732) or dora (arXiv:2402.09353)."""
    layer_position: Position = "encoder"
    """Stack of an encoder-decoder model that gets the layer; a decoder-only model has only its decoder."""
    layer_index: int | None = None
    """Number the inserted layer will have, at least 1; None for the end of the stack."""
    layer_initialization_scale: float = 0.01
    """Factor on the inserted layer's output projections; 0 leaves the model's function exactly as it was."""
    freeze_base: bool = True
    """Train the extension alone; False trains a copy that becomes a new model, never a shared base."""
    save_path: Path = Path("extensions")
    """Directory into which notebooks save, one folder per task."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_target_modules", tuple(self.lora_target_modules))
        object.__setattr__(self, "save_path", Path(self.save_path))
        violations = [(name, description) for name, wrong, description in self._checks() if wrong]
        if violations:
            raise ConfigInvalid(violations)

    def _checks(self) -> Iterable[tuple[str, bool, str]]:
        """(field, is wrong, what it must be) for every field that can be wrong by itself."""
        yield "lora_r", self.lora_r < 1, f"must be at least 1, got {self.lora_r}"
        yield "lora_alpha", not self.lora_alpha > 0, f"must be above 0, got {self.lora_alpha}"
        yield "lora_dropout", not 0 <= self.lora_dropout < 1, f"must be in [0, 1), got {self.lora_dropout}"
        yield "lora_variant", self.lora_variant not in get_args(Variant), f"must be one of {get_args(Variant)}"
        yield "layer_position", self.layer_position not in get_args(Position), f"must be one of {get_args(Position)}"
        yield (
            "layer_index",
            self.layer_index is not None and self.layer_index < 1,
            f"must be 1 or more, got {self.layer_index}",
        )
        scale = self.layer_initialization_scale
        yield "layer_initialization_scale", not 0 <= scale <= 1, f"must be in [0, 1], got {scale}"
        repeated = len(set(self.lora_target_modules)) < len(self.lora_target_modules)
        yield "lora_target_modules", repeated or "" in self.lora_target_modules, "names must be distinct and not empty"

    def targets(self, model: nn.Module) -> tuple[str, ...]:
        """The configured target modules, or the model type's default.

        Raises:
            ExtensionRefused: there is no default for this model type.
        """
        return self.lora_target_modules or lora.default_targets(model.config.model_type)

    def peft(self, model: nn.Module) -> LoraConfig:
        """PEFT's own configuration of the adapter on this model."""
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(self.targets(model)),
            use_rslora=self.lora_variant == "rslora",
            use_dora=self.lora_variant == "dora",
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        )
        config.fan_in_fan_out = lora.stores_transposed(model, config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """What decides the extension's function, as plain JSON."""
        fields = asdict(self) | {"lora_target_modules": list(self.lora_target_modules)}
        del fields["save_path"]
        return fields


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
