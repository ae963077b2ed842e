"""Training of one extension on a base that others use meanwhile: one optimizer step at a time.

Between two steps nothing of the training is in the base: the extension is active, the model in training mode, the base
frozen and torch's random numbers our own only inside `step`. So any number of other forwards may come in between, and
the loss curve does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from services.extensions.compute.config import ConfigInvalid
from services.extensions.compute.examples import IGNORED, Examples, Order
from services.residency.lenses.extension import ExtensionRefused, Extensions, overwrite
from services.residency.quantize import training_mode

Schedule = Literal["cosine", "linear", "constant"]


class Diverged(ArithmeticError):
    """The loss is no finite number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How an extension is trained.

    Raises:
        ConfigInvalid: names every field that is out of range.
    """

    steps: int
    """Optimizer steps."""
    batch_size: int = 8
    """Examples of a step."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Schedule = "cosine"
    """How the rate falls to 0 after the warm-up, or that it does not."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm."""
    seed: int = 0
    """Seed of dropout and of the order of examples."""

    def __post_init__(self) -> None:
        checks = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < 1,
            "lr_schedule": self.lr_schedule in ("cosine", "linear", "constant"),
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm > 0,
        }
        wrong = [(name, f"is out of range: {getattr(self, name)}") for name, valid in checks.items() if not valid]
        if wrong:
            raise ConfigInvalid(wrong)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.lr_schedule == "constant":
            return self.learning_rate
        factor = 1 - progress if self.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * factor


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean cross-entropy of the batch's labels before the update, nats per token."""
    learning_rate: float
    """Rate of this step."""
    grad_norm: float
    """2-norm of the gradient before clipping."""
    tokens: int
    """Tokens of this step, padding included."""
    tokens_seen: int
    """Tokens of all steps so far."""
    seconds: float
    """Wall time of this step."""


def causal_loss_sum(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of each label under the logits one position before it, float32."""
    logits = logits_BSV[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, labels_BS[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def label_count(labels_BS: torch.Tensor) -> int:
    """Number of labels that carry loss."""
    return int((labels_BS[:, 1:] != IGNORED).sum())


@torch.no_grad()
def loss_of_batch(model: nn.Module, batch: Examples) -> tuple[float, int]:
    """(summed cross-entropy in nats, number of labels) of a batch with whatever extension is active."""
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits
    return float(causal_loss_sum(logits, labels)), label_count(labels)


def held_out_loss(model: nn.Module, examples: Examples, batch_size: int = 8) -> float:
    """Mean cross-entropy in nats per label over all examples, summed in float64."""
    sums = [loss_of_batch(model, batch) for batch in examples.batches(batch_size)]
    return math.fsum(total for total, _ in sums) / sum(count for _, count in sums)


class Trainer:
    """Trains one attached extension; every method runs on the model's device thread."""

    def __init__(
        self, model: PreTrainedModel, attached: Extensions, key: str, examples: Examples, settings: TrainSettings
    ) -> None:
        """Prepare, without a step.

        Args:
            model: the base, in eval mode, with `attached`'s extensions.
            attached: where the extension is.
            key: which one to train.
            examples: what to train on.
            settings: how.

        Raises:
            ExtensionRefused: the base is no causal model.
        """
        if model.config.is_encoder_decoder:
            raise ExtensionRefused("base", "only decoder-only models can be trained on so far")
        self.settings = settings
        self.steps_done = 0
        self.tokens_seen = 0
        self._model = model
        self._attached = attached
        self._key = key
        self._examples = examples
        self._order = Order(len(examples), settings.batch_size, settings.seed)
        self._parameters = attached[key].trainable
        self._device = next(iter(self._parameters.values())).device
        with torch.inference_mode(False):
            self._optimizer = torch.optim.AdamW(
                self._parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
        self._rng = self._first_rng()

    @property
    def done(self) -> bool:
        """All steps are done."""
        return self.steps_done >= self.settings.steps

    def step(self) -> StepReport:
        """One optimizer step; afterwards the base and torch's random state are as before.

        Raises:
            Diverged: the loss is not finite; the weights are those before the step.
        """
        started = perf_counter()
        batch = self._examples.take(self._order.batch(self.steps_done))
        rate = self.settings.rate(self.steps_done)
        with self._exclusive():
            labels = batch.labels.to(self._device)
            logits = self._model(input_ids=batch.ids.to(self._device), use_cache=False).logits
            loss = causal_loss_sum(logits, labels) / label_count(labels)
            if not torch.isfinite(loss):
                raise Diverged(f"loss {loss.item()} at step {self.steps_done + 1}")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), self.settings.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.tokens_seen += batch.ids.numel()
        return StepReport(
            step=self.steps_done,
            loss=float(loss.detach()),
            learning_rate=rate,
            grad_norm=float(norm),
            tokens=batch.ids.numel(),
            tokens_seen=self.tokens_seen,
            seconds=perf_counter() - started,
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The base under this training: extension active, base frozen, training mode, our own random numbers."""
        own = {id(parameter) for parameter in self._parameters.values()}
        was_training = self._model.training
        with torch.inference_mode(False), torch.enable_grad(), self._attached.using(self._key), self._own_rng():
            flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(id(parameter) in own)
                training_mode(self._model)
                yield
            finally:
                self._model.train(was_training)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(self._rng["cpu"])
            if cuda:
                torch.cuda.set_rng_state(self._rng["cuda"], self._device)
            yield
            self._rng["cpu"] = torch.get_rng_state()
            if cuda:
                self._rng["cuda"] = torch.cuda.get_rng_state(self._device)

    def _first_rng(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.Generator().manual_seed(self.settings.seed).get_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.Generator(self._device).manual_seed(self.settings.seed).get_state()
        return states

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the next step depends on: CPU tensors by name, and facts as plain JSON."""
        tensors = {f"rng.{name}": state.clone() for name, state in self._rng.items()}
        for key, parameter in self._parameters.items():
            tensors[f"weights.{key}"] = parameter.detach().cpu().clone()
            for name, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value.detach().cpu().clone()
        return tensors, {"steps_done": self.steps_done, "tokens_seen": self.tokens_seen, "run": self._run()}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, bit for bit.

        Raises:
            ExtensionRefused: the state belongs to another extension, other examples or other settings.
        """
        if facts.get("run") != self._run():
            raise ExtensionRefused("checkpoint", "was taken from a training with other settings or examples")
        overwrite(self._parameters, _named(tensors, "weights."))
        steps, first, second = (_named(tensors, f"{name}.") for name in ("step", "exp_avg", "exp_avg_sq"))
        if first.keys() != second.keys() or first.keys() != steps.keys() or first.keys() - self._parameters.keys():
            raise ExtensionRefused("checkpoint", "the optimizer's state does not belong to this extension")
        for key in first:
            self._optimizer.state[self._parameters[key]] = {
                "step": steps[key].clone(),
                "exp_avg": first[key].to(self._device, copy=True),
                "exp_avg_sq": second[key].to(self._device, copy=True),
            }
        self._rng = {name: state.clone() for name, state in _named(tensors, "rng.").items()}
        self.steps_done, self.tokens_seen = int(facts["steps_done"]), int(facts["tokens_seen"])

    def _run(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "examples": self._examples.digest}


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
