"""What a transcoder is trained to be and how; checked as a whole before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

from services.residency.lenses.selection import ACTIVATIONS
from services.residency.lenses.transcoder import TranscoderShape

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A field of the configuration, or an argument beside it, is wrong."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training; every field that is None is resolved by a rule, which `resolved` writes out.

    Raises:
        ConfigError: (a ValueError) the first wrong field, named.
    """

    dict_size: int
    """Latents."""
    num_tokens: int
    """Rows to train on at least; a whole number of batches covers them, several times over the data when need be."""
    group_sizes: Sequence[int] | None = None
    """Increments of the nested groups, summing to dict_size; 1, 2, 4, 9 sixteenths when neither form is given."""
    prefix_widths: Sequence[int] | None = None
    """Cumulative widths of the nested prefixes, ending at dict_size; instead of group_sizes."""
    prefix_weights: Sequence[float] | None = None
    """Weight of each prefix in the loss; divided by their sum; equal when None."""
    top_k: int | None = None
    """Active latents per row, on average for batch_topk and jumprelu; dict_size / 200 to the nearest 32 when None."""
    activation: str = "topk"
    """topk, batch_topk or jumprelu."""
    skip: bool = False
    """Add a linear path from x to y (Paulo et al. 2025, arXiv:2501.18823)."""
    aux_k: int | None = None
    """Dead latents that share a step's auxiliary loss, in turns; half the output's width when None, none when 0."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss (Gao et al. 2024, arXiv:2406.04093, appendix A.2)."""
    dead_after_tokens: int | None = None
    """A latent is dead that was not active for so many rows; by the rule of `default_dead_after` when None."""
    batch_size: int = 2048
    """Rows per step."""
    learning_rate: float | None = None
    """Adam's; by the rule of `default_learning_rate` when None."""
    lr_schedule: str = "linear"
    """After the warm-up: constant, linear (to zero over the last fifth) or cosine (to zero)."""
    warmup_fraction: float = 0.05
    """Part of the steps over which the learning rate rises."""
    unit_norm_decoder: bool = False
    """Keep every decoder row at length 1, in scaled units, and move it only across its own direction."""
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient."""
    dtype: str = "float32"
    """Number format of the encoder's product; weights, moments, thresholds and the sums over active latents, decode and
    gradients, stay float32: those sums are exact so, and cost little."""
    seed: int = 0
    """Decides the initial weights and the order of the rows."""

    def __post_init__(self) -> None:
        for name in ("group_sizes", "prefix_widths", "prefix_weights"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("dict_size", "num_tokens", "batch_size"):
            _whole(name, getattr(self, name), 1)
        if self.batch_size > self.num_tokens:
            raise ConfigError("num_tokens", f"{self.num_tokens} is less than one batch of {self.batch_size}")
        self._check_groups()
        self._check_choices()
        for name, least in (("aux_k", 0), ("dead_after_tokens", 1), ("top_k", 1)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        if self.top_k is not None and self.top_k > self.dict_size:
            raise ConfigError("top_k", f"{self.top_k} is more than the dictionary's {self.dict_size}")
        for name, value in (("learning_rate", self.learning_rate), ("gradient_clip", self.gradient_clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(name, f"{value} is not a positive number")
        if not (math.isfinite(self.aux_weight) and self.aux_weight >= 0):
            raise ConfigError("aux_weight", f"{self.aux_weight} is not a number of at least 0")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError("warmup_fraction", f"{self.warmup_fraction} is not between 0 and 1")
        _whole("seed", self.seed, -(2**63))

    def _check_choices(self) -> None:
        for name, known in (("activation", ACTIVATIONS), ("lr_schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(name, f"{getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("skip", "unit_norm_decoder"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, f"{getattr(self, name)!r} is neither true nor false")

    def _check_groups(self) -> None:
        if self.group_sizes is not None and self.prefix_widths is not None:
            raise ConfigError("prefix_widths", "give group_sizes or prefix_widths, not both")
        if self.group_sizes is not None:
            for size in self.group_sizes:
                _whole("group_sizes", size, 1)
            if sum(self.group_sizes) != self.dict_size:
                raise ConfigError("group_sizes", f"sum to {sum(self.group_sizes)}, dict_size is {self.dict_size}")
        if self.prefix_widths is not None:
            for width in self.prefix_widths:
                _whole("prefix_widths", width, 1)
            if any(a >= b for a, b in pairwise(self.prefix_widths)):
                raise ConfigError("prefix_widths", "must increase")
            if not self.prefix_widths or self.prefix_widths[-1] != self.dict_size:
                raise ConfigError("prefix_widths", f"must end at dict_size {self.dict_size}")
        if self.prefix_weights is not None:
            if len(self.prefix_weights) != len(self.groups):
                raise ConfigError("prefix_weights", f"{len(self.prefix_weights)} for {len(self.groups)} prefixes")
            if not all(math.isfinite(w) and w >= 0 for w in self.prefix_weights) or not sum(self.prefix_weights):
                raise ConfigError("prefix_weights", "must be numbers of at least 0, not all 0")

    @property
    def groups(self) -> tuple[int, ...]:
        """Increments of the nested groups, whichever form was given."""
        if self.group_sizes is not None:
            return tuple(self.group_sizes)
        widths = self.prefix_widths
        if widths is None:
            widths = sorted({max(1, self.dict_size * part // 16) for part in (1, 3, 7)} | {self.dict_size})
        return tuple(b - a for a, b in pairwise((0, *widths)))

    @property
    def shape(self) -> TranscoderShape:
        """What the finished transcoder keeps of this."""
        return TranscoderShape(self.activation, self.top_k or default_top_k(self.dict_size), self.groups)

    @property
    def steps(self) -> int:
        """Batches that cover num_tokens."""
        return -(-self.num_tokens // self.batch_size)

    def resolved(self, d_out: int) -> TrainConfig:
        """The same with every rule written out, for a target of width `d_out`."""
        return replace(
            self,
            group_sizes=self.groups,
            prefix_widths=None,
            prefix_weights=tuple(self.prefix_weights or (1.0,) * len(self.groups)),
            top_k=self.shape.top_k,
            aux_k=d_out // 2 if self.aux_k is None else self.aux_k,
            dead_after_tokens=self.dead_after_tokens or max(self.batch_size, default_dead_after(self.num_tokens)),
            learning_rate=self.learning_rate or default_learning_rate(self.dict_size, self.steps),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `TrainConfig(**…)` of it (without prefix_widths beside group_sizes) is the same configuration."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def default_top_k(dict_size: int) -> int:
    """dict_size / 200 rounded to a multiple of 32, at least 32: 64 for 12,288 and 192 for 36,864 (spec/002)."""
    return min(dict_size, max(32, 32 * round(dict_size / 200 / 32)))


def default_learning_rate(dict_size: int, steps: int) -> float:
    """Falls with the square root of the dictionary's size, as sparsify's rule for Adam, and of the number of steps.

    5.5e-3 at 4,096 latents up to 128 steps, never less than sparsify's 4e-4 there, and never more than 1e-2: a higher
    rate reconstructs better and lets more latents die. Measured at 123 and 977 steps (tests/bench/training.py).
    """
    return min(1e-2, math.sqrt(4096 / dict_size) * max(4e-4, 5.5e-3 * min(1.0, math.sqrt(128 / steps))))


def default_dead_after(num_tokens: int) -> int:
    """A tenth of the run, of more than 100,000 tokens less: 32 times the root of their number."""
    return min(num_tokens // 10, 32 * math.isqrt(num_tokens))


def prefix_widths(groups: Sequence[int]) -> tuple[int, ...]:
    """Cumulative widths of groups given as increments."""
    return tuple(accumulate(groups))


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(name, f"{value!r} is not a whole number of at least {least}")
