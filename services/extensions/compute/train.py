"""Training of one extension on a base that others use meanwhile: one optimizer step at a time.

Between two steps nothing of the training is in the base: the extension is active, its modules in training mode, the
base frozen and torch's random numbers our own only inside `step`. So any number of other forwards may come in between,
and the loss curve does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from services.extensions.compute.adalora import RankBudget
from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.examples import Examples, Order
from services.extensions.compute.loss import label_count, loss_sum
from services.extensions.compute.optimizer import Optimizer, named
from services.extensions.compute.progressive import insert_due
from services.extensions.compute.settings import TrainSettings, figures_of
from services.extensions.compute.stopping import EarlyStopping
from services.extensions.compute.team import ALONE, Team
from services.residency.lenses.extension import ExtensionRefused, Extensions
from services.residency.quantize import is_quantized

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(ArithmeticError):
    """The loss is no finite number any more."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean cross-entropy of the step's labels before the update, nats per token."""
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


class Trainer:
    """Trains one attached extension; every method runs on the model's device thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        attached: Extensions,
        key: str,
        examples: Examples,
        settings: TrainSettings,
        *,
        config: ExtensionConfig | None = None,
        team: Team = ALONE,
    ) -> None:
        """Prepare, without a step.

        Args:
            model: the base, in eval mode, with `attached`'s extensions.
            attached: where the extension is.
            key: which one to train.
            examples: what to train on.
            settings: how.
            config: what the extension is made of, for what happens while it is trained: AdaLoRA's ranks, layers that
                are inserted later.
            team: processes that share each step's examples; every one has its own copy of the base.

        Raises:
            ExtensionRefused: the examples or settings do not fit the base or its device.
        """
        require_fit(model, examples, settings)
        self.settings = settings
        self.steps_done = 0
        self.tokens_seen = 0
        self.stopping = EarlyStopping(settings.patience)
        self._model = model
        self._attached = attached
        self._key = key
        self._examples = examples
        self._order = Order(len(examples), settings.examples_per_step, settings.seed)
        self._team = team
        self._config = config or ExtensionConfig()
        with torch.inference_mode(False):
            self._optimizer = Optimizer(attached[key].trainable, settings)
        self._budget = self._rank_budget()
        self.device = self._optimizer.device
        with attached.using(None):
            self._quantized = {id(module) for module in model.modules()} if is_quantized(model) else set()
        self._rng = self._first_rng()

    @property
    def best_step(self) -> int:
        """Step whose weights are the ones to keep."""
        return self.stopping.best_step if self.stopping.best_weights else self.steps_done

    @property
    def done(self) -> bool:
        """All steps are done, or the held-out loss has not fallen for long enough."""
        return self.steps_done >= self.settings.steps or self.stopping.due

    @property
    def to_be_judged(self) -> bool:
        """A held-out loss is due before the next step: hand it to `judged`."""
        every = self.settings.evaluate_every
        return bool(every) and self.steps_done > self.stopping.judged_at and self.steps_done % every == 0

    def judged(self, held_out: float) -> None:
        """Note the held-out loss of the weights as they are; the best ones are kept when training may stop early."""
        self.stopping.judged(self.steps_done, held_out, self._optimizer.weights)

    def settle(self) -> None:
        """Take the best weights, when early stopping kept any."""
        if self.stopping.best_weights:
            self._optimizer.load(self.stopping.best_weights)

    def step(self) -> StepReport:
        """One optimizer step; afterwards the base and torch's random state are as before.

        Raises:
            Diverged: the loss is not finite; the weights are those before the step.
        """
        started = perf_counter()
        rows = self._examples.take(self._order.batch(self.steps_done))
        rate = self.settings.rate(self.steps_done)
        self._grow(self.steps_done)
        with self._exclusive():
            try:
                loss = self._backward(rows)
                norm = self._optimizer.step(rate)
                if self._budget is not None:
                    self._budget.update(self.steps_done)
                    self._optimizer.publish()
            finally:
                self._optimizer.clear()
        self.steps_done += 1
        self.tokens_seen += rows.ids.numel()
        return StepReport(
            step=self.steps_done,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=rows.ids.numel(),
            tokens_seen=self.tokens_seen,
            seconds=perf_counter() - started,
        )

    def _backward(self, rows: Examples) -> float:
        """Gradients of the mean over all labels of the step, whatever number each batch of it holds; that mean."""
        labels = label_count(self._model, rows)
        total = torch.zeros((), device=self.device)
        for batch in rows.batches(self.settings.batch_size):
            with self._autocast():
                loss = loss_sum(self._model, batch.take(self._team.share)) / labels
            self._optimizer.backward(loss)
            total += loss.detach()
        if self._budget is not None:
            self._optimizer.backward(self._budget.orthogonality() / self._team.size)
        self._team.add([total, *self._optimizer.gradients()])
        if not torch.isfinite(total):
            raise Diverged(f"loss {total.item()} at step {self.steps_done + 1}")
        return total.item()

    def _rank_budget(self) -> RankBudget | None:
        trained = replace(self._attached[self._key], parameters=self._optimizer.masters)
        return RankBudget.of(trained, self._config, self.settings.steps)

    def _grow(self, steps_done: int) -> None:
        """Insert the layers whose step has come."""
        if all(layer.from_step == 0 for layer in self._config.placements):
            return
        with torch.inference_mode(False):
            new = insert_due(self._model, self._attached, self._key, self._config, steps_done)
        if new:
            self._optimizer.add(new)
            self.stopping.forget()

    @property
    def ranks(self) -> dict[str, int]:
        """Singular values that AdaLoRA keeps, by module; empty before its first pruning, and without it."""
        return self._budget.ranks if self._budget is not None else {}

    def _autocast(self) -> Any:
        dtype = _DTYPES.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The base under this training: extension active, base frozen, training mode, our own random numbers."""
        own = {id(parameter) for parameter in self._optimizer.parameters.values()}
        with torch.inference_mode(False), torch.enable_grad(), self._attached.using(self._key), self._own_rng():
            flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(id(parameter) in own)
                self._train_mode()
                yield
            finally:
                self._model.eval()
                if self.settings.gradient_checkpointing:
                    self._model.gradient_checkpointing_disable()
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def _train_mode(self) -> None:
        """Dropout on; off in the modules of a quantised base, whose layers are not meant to be trained through it."""
        self._model.train()
        if self.settings.gradient_checkpointing:
            # The re-entrant kind gives an adapter no gradient behind a frozen embedding, without a word.
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self._model.modules() if self._quantized else ():
            recomputed = self.settings.gradient_checkpointing and isinstance(module, GradientCheckpointingLayer)
            module.training = recomputed or id(module) not in self._quantized

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(self._rng["cpu"])
            if cuda:
                torch.cuda.set_rng_state(self._rng["cuda"], self.device)
            yield
            self._rng["cpu"] = torch.get_rng_state()
            if cuda:
                self._rng["cuda"] = torch.cuda.get_rng_state(self.device)

    def _first_rng(self) -> dict[str, torch.Tensor]:
        seed = self.settings.seed + self._team.rank
        states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()
        return states

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the next step depends on: CPU tensors by name, and facts as plain JSON.

        A team's processes all call this; each gets the whole, every process's random numbers included.
        """
        tensors, facts = self._optimizer.state()
        for name, state in self._rng.items():
            everyones = self._team.gather(state.clone(), self.device)
            tensors |= {f"{_rng_of(rank)}{name}": each for rank, each in enumerate(everyones)}
        tensors |= {f"best.{key}": weight for key, weight in self.stopping.best_weights.items()}
        if self._budget is not None:
            moments, facts["ranks"] = self._budget.state()
            tensors |= {f"ranks.{name}": tensor for name, tensor in moments.items()}
        facts |= {"steps_done": self.steps_done, "tokens_seen": self.tokens_seen, "run": self._run()}
        return tensors, facts | {"stopping": self.stopping.facts()}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, bit for bit.

        Raises:
            ExtensionRefused: the state belongs to another extension, other examples or other settings.
        """
        if facts.get("run") != self._run():
            raise ExtensionRefused("checkpoint", "was taken from a training with other settings or examples")
        self._grow(int(facts["steps_done"]) - 1)  # layers that were due before the next step are not in the state
        self._optimizer.restore(tensors, facts)
        if self._budget is not None:
            self._budget.restore(named(tensors, "ranks."), facts["ranks"])
        self.stopping.restore(facts["stopping"], named(tensors, "best."))
        self._rng = {name: state.clone() for name, state in named(tensors, _rng_of(self._team.rank)).items()}
        self.steps_done, self.tokens_seen = int(facts["steps_done"]), int(facts["tokens_seen"])

    def _run(self) -> dict[str, Any]:
        return {"settings": figures_of(self.settings), "examples": self._examples.digest}


def _rng_of(rank: int) -> str:
    """What the names of a process's random states begin with."""
    return f"rng{rank or ''}."


def require_fit(model: PreTrainedModel, examples: Examples, settings: TrainSettings) -> None:
    """Refuse what cannot be trained.

    Raises:
        ExtensionRefused: the examples or settings do not fit the base or its device.
    """
    if model.config.is_encoder_decoder is (examples.mask is None):
        raise ExtensionRefused(
            "dataset_id", "an encoder-decoder model learns from prompts and targets, others from rows"
        )
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ExtensionRefused("gradient_checkpointing", f"{model.config.model_type} has no layers that support it")
    if settings.precision == "fp16" and next(model.parameters()).device.type != "cuda":
        raise ExtensionRefused("precision", "fp16 is trained on CUDA only; take bf16 or fp32")
