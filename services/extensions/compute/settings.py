"""How an extension is trained: every figure that decides the run, valid once it exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from services.extensions.compute.config import ConfigInvalid

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How an extension is trained.

    Raises:
        ConfigInvalid: names every field that is out of range.
    """

    steps: int
    """Optimizer steps at most."""
    batch_size: int = 8
    """Examples of one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Schedule = "cosine"
    """How the rate falls to 0 after the warm-up, or that it does not."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of LoRA's B over that of A (LoRA+, arXiv:2402.12354, equation 5; it recommends 16)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm."""
    precision: Precision = "fp32"
    """Numbers of the forward pass; weights that are trained, their moments and the loss are float32 in any case."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    evaluate_every: int = 0
    """Steps between two held-out losses; 0 for none but before and after."""
    patience: int = 0
    """Held-out losses in a row that are no better than the best, after which training stops; 0 for never."""
    seed: int = 0
    """Seed of dropout and of the order of examples."""

    def __post_init__(self) -> None:
        wrong = [field.name for field in fields(self) if not self._in_range().get(field.name, True)]
        if wrong:
            raise ConfigInvalid([(name, f"is out of range: {getattr(self, name)}") for name in wrong])

    def _in_range(self) -> dict[str, bool]:
        return {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps >= 1,
            "learning_rate": 0 < self.learning_rate < 1,
            "lr_schedule": self.lr_schedule in get_args(Schedule),
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "loraplus_lr_ratio": self.loraplus_lr_ratio > 0,
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm > 0,
            "precision": self.precision in get_args(Precision),
            "evaluate_every": self.evaluate_every >= 0,
            "patience": self.patience >= 0 and (self.patience == 0 or self.evaluate_every > 0),
        }

    @property
    def examples_per_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.batch_size * self.gradient_accumulation_steps

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.lr_schedule == "constant":
            return self.learning_rate
        factor = 1 - progress if self.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * factor


def default_precision(model: Any) -> Precision:
    """bf16 where the GPU has it, else fp16, which T5 does not survive (transformers#14189); fp32 on a CPU."""
    if next(model.parameters()).device.type != "cuda":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32" if model.config.model_type == "t5" else "fp16"


def figures_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings as plain JSON, for whatever must compare or show them."""
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
