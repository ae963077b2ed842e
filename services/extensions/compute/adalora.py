"""AdaLoRA's part of a training step (Zhang et al., arXiv:2303.10512): which singular values an adapter keeps.

Without it an AdaLoRA adapter is silently trained at its first rank (peft#432). PEFT's allocator does the work; here it
is given the parameters of an `Extension` instead of a wrapped model.

    budget = RankBudget.of(extension, config, total_steps)
    loss = loss + budget.orthogonality()      # before backward()
    optimizer.step()
    pattern = budget.update(steps_done)       # before zero_grad(); steps_done counts from 0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from services.extensions.compute.config import ExtensionConfig
from services.residency.lenses.extension import Extension, ExtensionRefused
from services.residency.lenses.lora import ADAPTER

WARMUP_SHARE = 0.1
"""Share of the steps before the first pruning."""
FINAL_SHARE = 0.3
"""Share of the steps after the last one."""
INTERVAL = 10
"""Steps between two prunings, where there are that many."""
_MOMENTS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class _Parameters:
    """Stands for a model where PEFT lists parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Keys as PEFT's wrappers have them, with the adapter's name."""
        return ((f"{key}.{ADAPTER}", parameter) for key, parameter in self._parameters.items() if ".lora_" in key)


class RankBudget:
    """Prunes the ranks of one extension while it is trained; it knows nothing of models and optimizers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: AdaLoraConfig) -> None:
        self._model = _Parameters(parameters)
        self._config = config
        self._allocator = RankAllocator(self._model, config, ADAPTER)
        self._pattern: dict[str, list[bool]] = {}

    @classmethod
    def of(cls, extension: Extension, config: ExtensionConfig, total_steps: int) -> RankBudget | None:
        """The budget of an extension whose adapter is AdaLoRA; None for every other.

        Args:
            extension: what is trained.
            config: its configuration.
            total_steps: optimizer steps of the whole training.

        Raises:
            ExtensionRefused: the training is too short to prune in.
        """
        if config.lora_variant != "adalora" or not any(key.endswith("lora_E") for key in extension.parameters):
            return None
        warmup, final = round(WARMUP_SHARE * total_steps), round(FINAL_SHARE * total_steps)
        if warmup >= total_steps - final:
            raise ExtensionRefused("steps", f"{total_steps} are too few for adalora to prune in")
        schedule = AdaLoraConfig(
            init_r=config.lora_r,
            target_r=config.adalora_target,
            total_step=total_steps,
            tinit=warmup,
            tfinal=final,
            deltaT=max(1, min(INTERVAL, (total_steps - final - warmup) // 10)),
        )
        return cls(extension.parameters, schedule)

    @property
    def ranks(self) -> dict[str, int]:
        """Singular values that are kept, by module; empty before the first pruning."""
        end = f".lora_E.{ADAPTER}"
        return {key.removesuffix(end): sum(kept) for key, kept in self._pattern.items()}

    def orthogonality(self) -> torch.Tensor:
        """What the loss grows by where singular vectors are not orthonormal (eq. 4), weighted as configured."""
        terms = []
        for name, parameter in self._model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def update(self, step: int) -> dict[str, int]:
        """Weigh the singular values by their gradients, and zero those beyond the budget.

        Args:
            step: optimizer steps before this one.

        Returns:
            `ranks`.
        """
        last = self._config.total_step - self._config.tfinal
        if step <= last:
            _, pattern = self._allocator.update_and_allocate(self._model, step, force_mask=step == last)
            self._pattern = pattern or self._pattern
        if step == last:
            self._allocator.reset_ipt()
        if step > last and self._pattern:
            self._allocator.mask_using_rank_pattern(self._model, self._pattern)
        return self.ranks

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What the next update depends on: CPU tensors by name, and facts as plain JSON."""
        tensors = {
            f"{moment}.{key}": tensor.detach().cpu().clone()
            for moment in _MOMENTS
            for key, tensor in getattr(self._allocator, moment).items()
        }
        return tensors, {"pattern": self._pattern}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        devices = {name: parameter.device for name, parameter in self._model.named_parameters()}
        for moment in _MOMENTS:
            start = f"{moment}."
            named = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            setattr(self._allocator, moment, {key: value.to(devices[key]) for key, value in named.items()})
        self._pattern = {key: list(kept) for key, kept in facts["pattern"].items()}
