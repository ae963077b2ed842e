"""One transcoder in training: its weights, its optimiser, its counters."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import Encoder
from services.residency.lenses.transcoder import Transcoder
from services.training.compute import sparsity
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.config import TrainConfig
from services.training.compute.dead import revive
from services.training.compute.initial import Scale, initial_parameters, unit_rows
from services.training.compute.nested import Nested, Parameters, Prefixes, nested_gradients
from services.training.compute.products import PRODUCTS, faster
from services.training.compute.ranks import ALONE, Ranks
from services.training.compute.report import StepReport
from services.training.compute.schedule import learning_rate

_BETAS = (0.8, 0.9)
"""Adam's. A latent is active on a few rows of a batch, if any: a long memory of its gradients is of no use, and the
usual one of their squares holds it back after every large one. Measured against 0.9 and 0.999: a tenth less FVU."""
_THRESHOLD_PACE = 0.1
"""Of the learning rate, for jumprelu's thresholds. Adam's steps are as long for a latent that is rarely active as for
others: at the full rate thresholds drift out of their latents' reach, 85 % of them in 1,000 steps of the benchmark."""
_LEAST_VARIANCE = 1e-12
"""A batch whose target varies less, in scaled units, has nothing to explain."""


class NonFiniteLoss(ArithmeticError):
    """A step's loss is not a finite number; the coder is as it was before that step.

    Attributes:
        coder: its name. step: steps done before. facts: figures of the batch.
    """

    def __init__(self, coder: str, step: int, facts: dict[str, Any]) -> None:
        super().__init__(f"the loss of {coder} is not finite after {step} steps")
        self.coder, self.step, self.facts = coder, step, facts


class Coder:
    """Trains in scaled units: x * scale.source to y * scale.target. `transcoder` folds the factors into the weights."""

    def __init__(
        self, name: str, config: TrainConfig, scale: Scale, parameters: Parameters, *, products: str, ranks: Ranks
    ) -> None:
        """Take a resolved configuration and first weights, which are trained in place; the same ones on all ranks.

        `products` is a key of PRODUCTS, and part of what decides the last bits of the outcome.
        """
        device = parameters["W_enc"].device
        self.name, self.config, self.scale, self.parameters, self.step_count = name, config, scale, parameters, 0
        self._ranks, self._products = ranks, products
        weights = torch.tensor(config.prefix_weights, dtype=torch.float64)
        self._prefixes = Prefixes(config.shape.prefix_widths, (weights / weights.sum()).float().to(device))
        slow = [parameters["threshold"]] if "threshold" in parameters else []
        fast = [parameter for name, parameter in parameters.items() if name != "threshold"]
        groups = [{"params": fast, "pace": 1.0}, {"params": slow, "pace": _THRESHOLD_PACE}]
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
        self._threshold = torch.zeros((), device=device)
        self._idle_rows = torch.zeros(config.dict_size, dtype=torch.int64, device=device)

    @classmethod
    def start(cls, name: str, config: TrainConfig, x: Tensor, y: Tensor, ranks: Ranks = ALONE) -> Coder:
        """A coder for a resolved configuration, from a float32 sample x [N, d_in], y [N, d_out], the same on all ranks.

        Raises:
            NonFiniteLoss: the sample holds values that are not finite.
        """
        if not (_finite(x) and _finite(y)):
            raise NonFiniteLoss(name, 0, {"rows": len(x), "finite_x": _finite(x), "finite_y": _finite(y)})
        scale = Scale.of(x, y)
        parameters = initial_parameters(config, scale, x, y)
        if config.activation == "jumprelu":
            rows = x[: config.batch_size] * scale.source
            encoder = Encoder(parameters["W_enc"], parameters["b_enc"])
            codes = select_batch_topk(encoder, rows, config.shape.top_k)
            parameters["threshold"] = sparsity.lowest(codes, ALONE).expand(config.dict_size).clone()
        widths, rows = config.shape.prefix_widths, config.batch_size // ranks.world
        products = faster(
            d_in=x.shape[1], d_out=y.shape[1], widths=widths, top_k=config.shape.top_k, rows=rows, device=x.device
        )
        chosen = torch.tensor([products == "dense"], dtype=torch.int64, device=x.device)
        ranks.first_([*parameters.values(), chosen])
        return cls(name, config, scale, parameters, products="dense" if int(chosen) else "sparse", ranks=ranks)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> StepReport:
        """Train on this rank's rows of one batch, x [N, d_in], y [N, d_out], as stored.

        Raises:
            NonFiniteLoss: nothing was changed; on all ranks alike.
        """
        begin = time.perf_counter()
        x, y = x.float() * self.scale.source, y.float() * self.scale.target
        codes, nested, factor = self._gradients(x, y)
        self._ranks.mean_([nested.errors])
        l2_loss = float(nested.errors @ self._prefixes.weights)
        variance = float(self._ranks.variance(y))
        if not math.isfinite(l2_loss):
            facts = {"l2_loss": l2_loss, "rows": len(x), "finite_x": _finite(x), "finite_y": _finite(y)}
            raise NonFiniteLoss(self.name, self.step_count, facts)
        dead = (self._idle_rows >= self.config.dead_after_tokens).nonzero().flatten()
        aux_loss = self._revive(dead, x, nested)
        self._ranks.mean_(nested.gradients.values())
        norm, rate = self._update(nested.gradients)
        l0_per_prefix = self._count(codes)
        if self.config.activation == "jumprelu":
            sparsity.steer(self.parameters["threshold"], factor, rate / (self.config.learning_rate or rate))
        else:
            self._threshold = sparsity.follow_threshold(
                self.config,
                self.parameters,
                self._threshold,
                step=self.step_count,
                x=x,
                codes=codes,
                ranks=self._ranks,
            )
        self.step_count += 1
        seconds = time.perf_counter() - begin
        return StepReport(
            coder=self.name,
            step=self.step_count,
            tokens_seen=self.step_count * self.config.batch_size,
            seconds=seconds,
            tokens_per_second=self.config.batch_size / seconds,
            learning_rate=rate,
            loss=l2_loss + self.config.aux_weight * aux_loss,
            l2_loss=l2_loss,
            aux_loss=aux_loss,
            fvu_per_prefix=[error / max(variance, _LEAST_VARIANCE) for error in nested.errors.tolist()],
            l0_per_prefix=l0_per_prefix,
            dead_fraction=len(dead) / self.config.dict_size,
            gradient_norm=norm,
        )

    def transcoder(self, info: dict[str, Any] | None = None) -> Transcoder:
        """The trained map in units of the data; the factors are folded in here, and nowhere else."""
        source, target = self.scale.source, self.scale.target
        threshold = self.parameters.get("threshold", self._threshold.expand(self.config.dict_size))
        weights = {
            "W_enc": (self.parameters["W_enc"] * source).T,
            "b_enc": self.parameters["b_enc"].clone(),
            "W_dec": self.parameters["W_dec"] / target,
            "b_dec": self.parameters["b_dec"] / target,
            "threshold": threshold.clone(),
        }
        if "W_skip" in self.parameters:
            weights["W_skip"] = self.parameters["W_skip"] * (source / target)
        return Transcoder(self.config.shape, weights, info)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that change while training."""
        state = {f"parameter.{name}": tensor for name, tensor in self.parameters.items()}
        for name, tensor in self.parameters.items():
            for key, value in self._optimizer.state.get(tensor, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        return state | {"threshold": self._threshold, "idle_rows": self._idle_rows}

    def facts(self) -> dict[str, Any]:
        """What never changes, as plain JSON; with `tensors` and the step count it is the whole coder."""
        return {
            "config": self.config.to_dict(),
            "scale": [self.scale.source, self.scale.target],
            "products": self._products,
        }

    @classmethod
    def restored(
        cls,
        name: str,
        config: TrainConfig,
        scale: Scale,
        tensors: dict[str, Tensor],
        *,
        step_count: int,
        products: str,
        device: torch.device | str,
        ranks: Ranks = ALONE,
    ) -> Coder:
        """The coder that gave `tensors` after `step_count` steps, bit for bit.

        Raises:
            ValueError: a tensor is missing or has another shape than the configuration says.
        """
        own = {key: value.to(device, copy=True) for key, value in tensors.items()}
        parameters = {
            key.removeprefix("parameter."): value for key, value in own.items() if key.startswith("parameter.")
        }
        _check_parameters(config, parameters)
        if not {"threshold", "idle_rows"} <= own.keys():
            raise ValueError("threshold, idle_rows: missing")
        coder = cls(name, config, scale, parameters, products=products, ranks=ranks)
        for key, parameter in parameters.items():
            prefix = f"optimizer.{key}."
            moments = {key_.removeprefix(prefix): value for key_, value in own.items() if key_.startswith(prefix)}
            if step_count and moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"{prefix}*: missing")
            if moments:
                coder._optimizer.state[parameter] = moments
        coder._threshold, coder._idle_rows, coder.step_count = own["threshold"], own["idle_rows"], step_count
        return coder

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Codes, Nested, float]:
        """Codes, gradients, and by how much jumprelu's thresholds are off."""
        kind = PRODUCTS[self._products]
        if self.config.activation != "jumprelu":
            codes = sparsity.select(self.config, self.parameters, self._threshold, x, self._ranks)
            return codes, nested_gradients(self.parameters, codes, x, y, self._prefixes, kind=kind), 1.0
        window = sparsity.Window.of(self.config, self.parameters, x)
        nested = nested_gradients(self.parameters, window.codes, x, y, self._prefixes, kind=kind)
        nested.gradients["threshold"] = window.gradient(self.parameters["threshold"], nested.by_value)
        factor = window.factor(self.parameters["threshold"], self.config.shape.top_k, self._ranks)
        return window.codes.where(window.codes.value != 0), nested, factor

    def _revive(self, dead: Tensor, x: Tensor, nested: Nested) -> float:
        if not len(dead) or not self.config.aux_k:
            return 0.0
        most = self.config.aux_k
        if len(dead) > most:  # they take turns, for a third of what all at once would cost
            dead = dead.roll(-most * self.step_count)[:most]
        revival = revive(
            self.parameters,
            dead,
            x,
            nested.residual,
            aux_k=self.config.aux_k,
            weight=self.config.aux_weight,
            ranks=self._ranks,
        )
        for name, gradient in revival.gradients.items():
            nested.gradients[name].index_add_(0, dead, gradient)
        loss = torch.tensor(revival.loss, dtype=torch.float64, device=x.device)
        self._ranks.mean_([loss])
        return float(loss)

    def _update(self, gradients: Parameters) -> tuple[float, float]:
        W_dec = self.parameters["W_dec"]
        if self.config.unit_norm_decoder:
            gradients["W_dec"] -= (gradients["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        rate = learning_rate(self.config, self.step_count)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
            if norm > self.config.gradient_clip:
                parameter.grad.mul_(self.config.gradient_clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.config.unit_norm_decoder:
            W_dec.copy_(unit_rows(W_dec))
        if "threshold" in self.parameters:
            self.parameters["threshold"].clamp_(min=0)
        return norm, rate

    def _count(self, codes: Codes) -> list[float]:
        """Note who was active; L0 of each prefix."""
        counts = self._ranks.total(codes.counts())
        self._idle_rows += self.config.batch_size
        self._idle_rows[counts > 0] = 0
        within = counts.cumsum(0)[torch.tensor(self._prefixes.widths, device=counts.device) - 1]
        return (within / self.config.batch_size).tolist()


def _check_parameters(config: TrainConfig, parameters: Parameters) -> None:
    wanted = {"W_enc", "b_enc", "W_dec", "b_dec"}
    wanted |= {"W_skip"} if config.skip else set()
    wanted |= {"threshold"} if config.activation == "jumprelu" else set()
    if parameters.keys() != wanted:
        raise ValueError(f"parameters: {sorted(parameters)}, expected {sorted(wanted)}")
    for name in wanted - {"b_dec", "W_skip"}:
        if len(parameters[name]) != config.dict_size:
            raise ValueError(f"parameter.{name}: {list(parameters[name].shape)} for {config.dict_size} latents")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
