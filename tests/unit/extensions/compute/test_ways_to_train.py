"""Ways to train the same step: accumulated, recomputed, in bf16, faster on B, on T5, with early stopping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from services.extensions.compute import ExtensionConfig, HybridExtension, LoRAExtension, TransformerLayerExtension
from services.extensions.compute.config import LayerPlacement
from services.extensions.compute.examples import IGNORED, Examples, from_prompts, from_texts
from services.extensions.compute.loss import held_out_loss
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.task_extensions import TaskExtensions
from services.extensions.compute.train import Trainer
from services.residency.lenses.extension import ExtensionRefused
from tests.models import TEXTS, quantized, tiny, tokenizer

TASK = "add-two"
TARGETS = {"gpt2": ("c_attn",), "t5": ("q", "v")}


def extended(family: str = "gpt2", kind: str = "lora", **config: object) -> TaskExtensions:
    chosen = ExtensionConfig(**{"lora_r": 4, "lora_target_modules": TARGETS[family], **config})
    model = tiny(family, 2)
    if kind == "lora":
        extension: TaskExtensions = LoRAExtension(model, chosen)
        extension.create_adapter(TASK)
    elif kind == "layer":
        extension = TransformerLayerExtension(model, chosen)
        extension.create_extended_model(TASK)
    else:
        extension = HybridExtension(model, chosen)
        extension.create_hybrid_model(TASK)
    extension.switch_to(None)
    return extension


def without_dropout(extension: TaskExtensions) -> TaskExtensions:
    with extension.attached.using(TASK):
        for module in extension.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return extension


def rows() -> Examples:
    encode = tokenizer()
    return from_texts((encode(text)["input_ids"] for text in TEXTS * 2), 16, separator=2)


def prompts() -> Examples:
    encode = tokenizer()
    pairs = [(encode(text)["input_ids"][:9], encode(text)["input_ids"][9:14]) for text in TEXTS]
    return from_prompts(pairs, 16, end=2, pad=0)


def trainer(
    extension: TaskExtensions, examples: Examples, config: ExtensionConfig | None = None, **settings: object
) -> Trainer:
    chosen = TrainSettings(**{"steps": 12, "batch_size": 4, "learning_rate": 5e-3, **settings})
    return Trainer(extension.model, extension.attached, TASK, examples, chosen, config=config)


def gradients(training: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients that one step hands to its optimizer."""
    seen: list[torch.Tensor] = []
    update = training._optimizer.step

    def watched(rate: float) -> float:
        seen.extend(gradient.clone() for gradient in training._optimizer.gradients())
        return update(rate)

    monkeypatch.setattr(training._optimizer, "step", watched)
    training.step()
    return seen


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "lora"), ("gpt2", "hybrid"), ("t5", "lora"), ("t5", "hybrid")])
def test_recomputed_layers_give_the_same_gradients_to_everything(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the re-entrant kind, or one layer forgotten, gradients are missing (open-unlearning#178)."""
    examples = prompts() if family == "t5" else rows()
    found, forwards = [], []
    for recomputed in (False, True):
        extension = extended(family, kind, layer_initialization_scale=0.5)
        attention = extension.model.get_submodule("transformer.h.1.attn" if family == "gpt2" else "encoder.block.1")
        calls: list[int] = []
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        training = trainer(extension, examples, gradient_checkpointing=recomputed)
        found.append(gradients(training, monkeypatch))
        forwards.append(len(calls))
        assert len(found[-1]) == len(extension.attached[TASK].parameters), "every parameter has a gradient"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert forwards[0] == 1, "kept activations need one forward"
    if family == "gpt2":
        assert forwards[1] == 2, "the layer was computed again"


def test_accumulated_batches_are_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with unequal numbers of labels: a mean of means would be another gradient."""
    examples = rows()
    labels = examples.labels.clone()
    labels[::3, 4:] = IGNORED
    examples = Examples(examples.ids, labels)
    found = []
    for batch_size, parts in ((8, 1), (2, 4)):
        training = trainer(
            without_dropout(extended()), examples, batch_size=batch_size, gradient_accumulation_steps=parts
        )
        found.append(gradients(training, monkeypatch))
        assert training.tokens_seen == 8 * 16
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-4, atol=1e-7)


def test_loraplus_moves_b_faster() -> None:
    """AdamW's first step is the rate itself, whatever the gradient (arXiv:2402.12354)."""
    extension = extended()
    before = extension.attached[TASK].state()
    trainer(extension, rows(), loraplus_lr_ratio=16.0, lr_schedule="constant", max_grad_norm=1e9).step()
    after = extension.attached[TASK].state()
    for key, weight in after.items():
        moved = float((weight - before[key]).abs().max())
        expected = 5e-3 * 16 if ".lora_B." in key else 0.0  # A has no gradient while B is zero
        assert moved == pytest.approx(expected, rel=1e-2), key


@pytest.mark.parametrize("kind", ["lora", "layer"])
def test_bf16_forward_trains_float32_weights(kind: str) -> None:
    """autocast rounds the forward pass; weights and moments are not rounded, so that small steps add up."""
    losses, weights = {}, {}
    for precision in ("fp32", "bf16"):
        extension = extended("gpt2", kind)
        training = trainer(extension, rows(), precision=precision)
        losses[precision] = [training.step().loss for _ in range(12)]
        weights[precision] = extension.attached[TASK].state()
        assert all(weight.dtype == torch.float32 for weight in weights[precision].values())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"][-1] < losses["bf16"][0]


def test_a_layer_of_a_bf16_base_learns_in_float32() -> None:
    """A step far below bfloat16's resolution is kept in the master until it shows."""
    extension = TransformerLayerExtension(tiny("gpt2", 2).bfloat16(), ExtensionConfig(layer_initialization_scale=0.0))
    extension.create_extended_model(TASK)
    extension.switch_to(None)
    training = trainer(extension, rows(), learning_rate=1e-5, lr_schedule="constant", steps=400)
    key = next(key for key in extension.attached[TASK].parameters if key.endswith("ln_1.weight"))
    parameter = extension.attached[TASK].parameters[key]
    start, master = parameter.detach().clone(), training._optimizer.masters[key]
    training.step()
    training.step()
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, start), "one step is less than half a unit in the last place"
    assert not torch.equal(master.detach(), start.float())
    tensors, facts = training.state()
    again = trainer(extension, rows(), learning_rate=1e-5, lr_schedule="constant", steps=400)
    again.restore(tensors, facts)
    assert torch.equal(again._optimizer.masters[key], master)


def test_fp16_is_refused_without_a_gpu() -> None:
    with pytest.raises(ExtensionRefused, match="precision"):
        trainer(extended(), rows(), precision="fp16")


@pytest.mark.parametrize("kind", ["lora", "layer", "hybrid"])
def test_t5_learns_targets_from_prompts(kind: str) -> None:
    extension = extended("t5", kind, layer_position="both", layer_initialization_scale=0.0)
    examples = prompts()
    start = held_out_loss(extension.model, examples)
    training = trainer(extension, examples, steps=20, batch_size=5, learning_rate=2e-2)
    while not training.done:
        training.step()
    assert held_out_loss(extension.model, examples) == start
    with extension.attached.using(TASK):
        assert held_out_loss(extension.model, examples) < start - 0.1


def test_t5s_loss_is_transformers_own_and_ignores_padding() -> None:
    model, examples = tiny("t5", 2), prompts()
    with torch.no_grad():
        theirs = model(input_ids=examples.ids, attention_mask=examples.mask, labels=examples.labels).loss
    assert held_out_loss(model, examples) == pytest.approx(float(theirs), rel=1e-6)
    wider = Examples(
        torch.nn.functional.pad(examples.ids, (0, 5)),
        torch.nn.functional.pad(examples.labels, (0, 3), value=IGNORED),
        torch.nn.functional.pad(examples.mask, (0, 5)),
    )
    assert held_out_loss(model, wider) == pytest.approx(float(theirs), rel=1e-5)


def test_a_model_gets_the_rows_it_reads() -> None:
    for family, examples in (("t5", rows()), ("gpt2", prompts())):
        with pytest.raises(ExtensionRefused, match="dataset_id"):
            trainer(extended(family), examples)


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    extension = extended()
    training = trainer(extension, rows(), steps=50, evaluate_every=2, patience=2)
    best: dict[str, torch.Tensor] = {}
    for loss in (3.0, 2.5, 2.5, math.inf):
        training.step()
        assert not training.to_be_judged
        training.step()
        assert training.to_be_judged
        training.judged(loss)
        assert not training.to_be_judged
        if loss == 2.5 and not best:
            best = extension.attached[TASK].state()
    assert training.done
    assert training.steps_done == 8
    assert training.stopping.best_step == 4
    training.settle()
    settled = extension.attached[TASK].state()
    assert all(torch.equal(settled[key], best[key]) for key in best)


def test_early_stopping_goes_on_after_a_restart() -> None:
    extension = extended()
    training = trainer(extension, rows(), steps=50, evaluate_every=1, patience=2)
    for loss in (2.0, 2.1):
        training.step()
        training.judged(loss)
    tensors, facts = training.state()
    other = trainer(extended(), rows(), steps=50, evaluate_every=1, patience=2)
    other.restore(tensors, facts)
    assert not other.to_be_judged
    assert not other.done
    other.step()
    other.judged(2.2)
    assert other.done
    other.settle()
    assert torch.equal(other._optimizer.masters[key := next(iter(other._optimizer.masters))], tensors[f"best.{key}"])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_stays_in_eval_mode_while_it_is_trained_on(bits: int) -> None:
    """Its layers and dropouts in eval mode, the adapters' dropout on; recomputing gives the same gradients."""
    losses = []
    for recomputed in (False, True):
        model = quantized("gpt2", bits)
        extension = LoRAExtension(model, ExtensionConfig(lora_r=4, lora_target_modules=("c_attn",)))
        extension.create_adapter(TASK)
        extension.switch_to(None)
        base = [module for module in model.modules() if not isinstance(module, GradientCheckpointingLayer)]
        modes: list[tuple[bool, bool]] = []

        def look(*_: object, base: list = base, model: nn.Module = model, modes: list = modes) -> None:
            own = [module for name, module in model.named_modules() if name.endswith("lora_dropout.lensmesh_task")]
            modes.append((any(module.training for module in base), all(module.training for module in own)))

        model.register_forward_pre_hook(look)
        training = trainer(extension, rows(), gradient_checkpointing=recomputed)
        losses.append([training.step().loss for _ in range(6)])
        assert modes == [(False, True)] * 6
        assert not any(module.training for module in model.modules())
        assert all(float(p.detach().norm()) > 0 for p in extension.attached[TASK].parameters.values())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_adalora_is_pruned_by_training_and_resumes() -> None:
    """Without its part of the step it trains as plain LoRA, without a word (peft#432)."""
    config = {"lora_variant": "adalora", "lora_r": 6, "lora_target_r": 2, "lora_target_modules": ("c_attn", "c_fc")}
    extension = extended(**config)
    training = trainer(extension, rows(), steps=30, learning_rate=2e-2, config=extension.config)
    for _ in range(12):
        training.step()
    tensors, facts = training.state()
    expected = [training.step().loss for _ in range(18)]
    ranks = training.ranks
    assert sum(ranks.values()) == 4 * 2, "the mean rank is the target"
    kept = {
        key.split(".lora_E")[0].removeprefix("base_model.model."): int((weight != 0).sum())
        for key, weight in extension.attached[TASK].state().items()
        if ".lora_E" in key
    }
    assert sorted(kept.values()) == sorted(ranks.values())
    weights = extension.attached[TASK].state()

    other = extended(**config)
    resumed = trainer(other, rows(), steps=30, learning_rate=2e-2, config=other.config)
    resumed.restore(tensors, facts)
    assert [resumed.step().loss for _ in range(18)] == expected
    again = other.attached[TASK].state()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert resumed.ranks == ranks


def test_layers_are_inserted_while_it_is_trained_and_after_a_restart() -> None:
    layers = (
        LayerPlacement(position="decoder", index=1, initialization_scale=0.0),
        LayerPlacement(position="decoder", index=3, initialization_scale=0.0, from_step=4),
    )

    def begun() -> tuple[TaskExtensions, Trainer]:
        extension = TransformerLayerExtension(tiny("gpt2", 2), ExtensionConfig(layers=layers))
        extension.create_extended_model(TASK)
        extension.switch_to(None)
        return extension, trainer(extension, rows(), steps=9, config=extension.config, patience=5, evaluate_every=3)

    extension, training = begun()
    sizes = []
    for number in range(9):
        training.step()
        sizes.append(len(extension.attached[TASK].parameters))
        if training.to_be_judged:
            training.judged(9.0 - number)
        if number == 5:
            tensors, facts = training.state()
    one = sizes[0]
    assert sizes == [one] * 4 + [2 * one] * 5
    weights = extension.attached[TASK].state()
    assert all(float(weights[key].norm()) > 0 for key in weights if key.endswith("c_proj.weight"))
    other, resumed = begun()
    resumed.restore(tensors, facts)
    for number in range(6, 9):
        resumed.step()
        if resumed.to_be_judged:
            resumed.judged(9.0 - number)
    again = other.attached[TASK].state()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)
