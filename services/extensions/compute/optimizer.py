"""AdamW over an extension's parameters: float32 masters, LoRA+ rates, loss scaling for fp16, and its state on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from services.extensions.compute.settings import TrainSettings
from services.residency.lenses.extension import ExtensionRefused

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of one parameter, the first two as torch names them."""


class Optimizer:
    """Updates parameters of any dtype by masters in float32; a float32 parameter is its own master."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        """Begin; `parameters` by their checkpoint keys. `masters` are what is updated, by the same keys."""
        self.parameters = dict(parameters)
        self.device = next(iter(self.parameters.values())).device
        self._max_norm = settings.max_grad_norm
        self.masters = {key: _master(parameter) for key, parameter in self.parameters.items()}
        ratio = settings.loraplus_lr_ratio
        rates: dict[float, list[nn.Parameter]] = {1.0: [], ratio: []}
        for key, master in self.masters.items():
            rates[ratio if ".lora_B" in key else 1.0].append(master)
        self._adamw = torch.optim.AdamW(
            [{"params": masters, "factor": factor} for factor, masters in rates.items() if masters],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Update these, too, from now on."""
        masters = {key: _master(parameter) for key, parameter in parameters.items()}
        self._adamw.add_param_group({"params": list(masters.values()), "factor": 1.0})
        self.parameters |= parameters
        self.masters |= masters

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to what is there."""
        self._scaler.scale(loss).backward()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients so far, in the order of the parameters."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def step(self, rate: float) -> float:
        """Update the weights; the 2-norm of the gradient before it was clipped.

        An fp16 step whose scaled gradients overflowed changes nothing but the scale.
        """
        for key, parameter in self.parameters.items():
            master = self.masters[key]
            if master is not parameter and parameter.grad is not None:
                own = master.grad if master.grad is not None else 0
                master.grad, parameter.grad = own + parameter.grad.float(), None
        self._scaler.unscale_(self._adamw)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self._max_norm)
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["factor"]
        self._scaler.step(self._adamw)
        self._scaler.update()
        self.publish()
        return float(norm)

    def clear(self) -> None:
        """Forget the gradients."""
        for key, parameter in self.parameters.items():
            parameter.grad = self.masters[key].grad = None

    def publish(self) -> None:
        """Give the parameters their masters' values."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                if self.masters[key] is not parameter:
                    parameter.copy_(self.masters[key])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Masters and moments as CPU tensors by name, and the loss scale."""
        tensors = {f"weights.{key}": _copied(master) for key, master in self.masters.items()}
        for key, master in self.masters.items():
            for name, value in self._adamw.state.get(master, {}).items():
                tensors[f"{name}.{key}"] = _copied(value)
        return tensors, {"scaler": self._scaler.state_dict()}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ExtensionRefused: the state belongs to another extension.
        """
        weights = named(tensors, "weights.")
        moments = [named(tensors, f"{name}.") for name in MOMENTS]
        if weights.keys() != self.masters.keys() or any(part.keys() - weights.keys() for part in moments):
            raise ExtensionRefused("checkpoint", "the optimizer's state does not belong to this extension")
        for key, master in self.masters.items():
            master.data.copy_(weights[key])
        for key in moments[0]:
            state = {name: part[key] for name, part in zip(MOMENTS, moments, strict=True)}
            self._adamw.state[self.masters[key]] = {
                name: value.to(self.device, copy=True) for name, value in state.items()
            }
        if facts["scaler"]:
            self._scaler.load_state_dict(facts["scaler"])
        self.publish()

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the weights; the moments stay."""
        for key, master in self.masters.items():
            master.data.copy_(weights[key])
        self.publish()

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the masters on the CPU."""
        return {key: _copied(master) for key, master in self.masters.items()}


def named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()
