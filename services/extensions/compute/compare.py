"""spec/004's comparison of the kinds: parameters, shares and ratios; with training, losses, seconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel, T5Config

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import ParameterCounts, distinct_parameters
from services.extensions.compute.examples import Examples
from services.extensions.compute.kinds import KINDS
from services.extensions.compute.loss import held_out_loss
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.train import Trainer
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import assemble

TASK = "compared"


@dataclass(frozen=True, slots=True)
class Trained:
    """What training one kind did."""

    loss_before: float
    """Held-out, nats per token."""
    loss_after: float
    seconds: float
    """Of all steps together."""
    nbytes: int
    """Of the extension's weights in memory."""


def spec_config() -> T5Config:
    """The T5 of spec/004, whose file holds a head of its own."""
    return T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def spec_parameters(model: PreTrainedModel) -> int:
    """What a file of that model holds: transformers ties the head whatever the config says, the file does not."""
    return distinct_parameters(model) + model.get_input_embeddings().weight.numel()


def counted(model: PreTrainedModel, base: int, config: ExtensionConfig) -> dict[str, ParameterCounts]:
    """Counts of every kind.

    Args:
        model: the base or its skeleton.
        base: the base's own count.
        config: of all of them.

    Raises:
        ExtensionRefused: the configuration does not fit the model.
    """
    return {name: kind.counts(model, config, base) for name, kind in KINDS.items()}


def ratios(counts: Mapping[str, ParameterCounts]) -> dict[str, float]:
    """Hybrid's parameters over those of its parts alone."""
    hybrid = counts["hybrid"].trainable
    return {f"hybrid_over_{name}": hybrid / counts[name].trainable for name in ("lora", "layer")}


def trained(
    model: PreTrainedModel,
    examples: tuple[Examples, Examples],
    config: ExtensionConfig,
    settings: TrainSettings,
) -> dict[str, Trained]:
    """Train every kind on the same steps, one after the other, on a base that ends as it was.

    Args:
        model: the base, in eval mode.
        examples: to train on, and held out.
        config: of all of them.
        settings: how.
    """
    return {name: _trained(model, name, examples, config, settings) for name in KINDS}


def _trained(
    model: PreTrainedModel,
    kind: str,
    examples: tuple[Examples, Examples],
    config: ExtensionConfig,
    settings: TrainSettings,
) -> Trained:
    attached = Extensions()
    draft = KINDS[kind].draft(model, config, settings.seed)
    attached.attach(TASK, assemble(model, draft.operations, draft.weights, draft.adapter))
    rows, held_out = examples
    with attached.using(TASK):
        before = held_out_loss(model, held_out)
    trainer = Trainer(model, attached, TASK, rows, settings, config=config)
    started = perf_counter()
    while not trainer.done:
        trainer.step()
    seconds = perf_counter() - started
    with attached.using(TASK):
        after = held_out_loss(model, held_out)
    return Trained(before, after, seconds, attached[TASK].nbytes)


def as_json(counts: Mapping[str, ParameterCounts], learnt: Mapping[str, Trained]) -> dict[str, Any]:
    """Everything by kind, as plain JSON."""
    kinds = {
        name: {**found.as_dict(), **(asdict(learnt[name]) if name in learnt else {})} for name, found in counts.items()
    }
    return {"base": next(iter(counts.values())).base, "kinds": kinds, "ratios": ratios(counts)}
