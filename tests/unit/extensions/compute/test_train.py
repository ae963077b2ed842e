"""Training an adapter on a shared base: it learns, disturbs nobody, and resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from services.extensions.compute.config import ConfigInvalid, ExtensionConfig
from services.extensions.compute.examples import IGNORED, Examples, from_pairs, from_texts
from services.extensions.compute.loss import held_out_loss
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.task_extensions import LoRAExtension
from services.extensions.compute.train import Diverged, Trainer
from services.residency.lenses.extension import ExtensionRefused
from tests.models import TEXTS, batch, tiny, tokenizer

TASK = "add-two"


@pytest.fixture
def extension() -> LoRAExtension:
    lora = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, lora_target_modules=("c_attn", "c_fc")))
    lora.create_adapter(TASK)
    lora.switch_to(None)
    return lora


@pytest.fixture
def examples() -> Examples:
    encode = tokenizer()
    return from_texts((encode(text)["input_ids"] for text in TEXTS), 16, separator=2)


def trainer(extension: LoRAExtension, examples: Examples, **settings: object) -> Trainer:
    chosen = TrainSettings(**{"steps": 12, "batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 2, **settings})
    return Trainer(extension.model, extension.attached, TASK, examples, chosen)


def base_logits(extension: LoRAExtension) -> torch.Tensor:
    with torch.inference_mode():
        return extension.model(batch()).logits


def test_training_lowers_the_loss_and_leaves_the_base_between_steps(
    extension: LoRAExtension, examples: Examples
) -> None:
    before = base_logits(extension)
    start = held_out_loss(extension.model, examples)
    training = trainer(extension, examples, steps=15)
    flags = [parameter.requires_grad for parameter in extension.model.parameters()]
    state = torch.get_rng_state()
    while not training.done:
        training.step()
        assert torch.equal(base_logits(extension), before)
    assert not extension.model.training
    assert [parameter.requires_grad for parameter in extension.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in extension.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert held_out_loss(extension.model, examples) == start
    with extension.attached.using(TASK):
        assert held_out_loss(extension.model, examples) < 0.95 * start
    assert all(float(p.detach().norm()) > 0 for p in extension.attached[TASK].parameters.values())


def test_another_active_extension_does_not_leak_into_training(examples: Examples) -> None:
    losses = []
    for other_active in (False, True):
        lora = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, lora_target_modules=("c_attn",)))
        lora.create_adapter(TASK)
        lora.create_adapter("other", seed=3)
        with torch.no_grad():
            for parameter in lora.attached["other"].parameters.values():
                parameter.add_(0.3)
        lora.switch_to("other" if other_active else None)
        training = trainer(lora, examples)
        losses.append([training.step().loss for _ in range(4)])
        assert lora.attached.active == ("other" if other_active else None)
    assert losses[0] == losses[1]


def test_resuming_is_bit_exact(extension: LoRAExtension, examples: Examples) -> None:
    whole = trainer(extension, examples)
    reports = [whole.step() for _ in range(5)]
    tensors, facts = whole.state()
    expected = [whole.step().loss for _ in range(7)]
    weights = extension.attached[TASK].state()
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]

    other = LoRAExtension(tiny("gpt2", 2), extension.config)
    other.create_adapter(TASK, seed=99)
    other.switch_to(None)
    torch.rand(7)
    resumed = trainer(other, examples)
    resumed.restore(tensors, facts)
    assert resumed.tokens_seen == reports[-1].tokens_seen
    assert [resumed.step().loss for _ in range(7)] == expected
    assert resumed.done
    again = other.attached[TASK].state()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize("change", ["settings", "examples"])
def test_a_checkpoint_of_another_training_is_refused(extension: LoRAExtension, examples: Examples, change: str) -> None:
    tensors, facts = trainer(extension, examples).state()
    other = (
        trainer(extension, examples, learning_rate=1e-4)
        if change == "settings"
        else trainer(extension, examples.take(slice(1, None)))
    )
    with pytest.raises(ExtensionRefused, match="checkpoint"):
        other.restore(tensors, facts)


def test_the_seed_decides_the_run(extension: LoRAExtension, examples: Examples) -> None:
    fresh = extension.attached[TASK].state()
    runs = []
    for seed in (1, 1, 2):
        extension.attached[TASK].load(fresh)
        training = trainer(extension, examples, seed=seed)
        runs.append([training.step().loss for _ in range(3)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_one_step_is_a_step_of_adamw_on_the_clipped_gradient(extension: LoRAExtension, examples: Examples) -> None:
    """Against autograd and AdamW written out; dropout off."""
    lora = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, lora_dropout=0.0, lora_target_modules=("c_attn",)))
    lora.model.config.attn_pdrop = 0.0
    lora.create_adapter(TASK)
    lora.switch_to(None)
    for module in lora.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    training = trainer(lora, examples, batch_size=len(examples), warmup_steps=0, max_grad_norm=0.01)
    before = lora.attached[TASK].state()
    parameters = lora.attached[TASK].parameters
    with lora.attached.using(TASK):
        logits = lora.model(examples.ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), examples.labels[:, 1:].flatten(), ignore_index=IGNORED)
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    report = training.step()
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for key, parameter in parameters.items():
        clipped = grads[key] * (0.01 / norm)
        expected = before[key] - 5e-3 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training_unchanged(extension: LoRAExtension, examples: Examples) -> None:
    training = trainer(extension, examples)
    training.step()
    key = next(iter(extension.attached[TASK].parameters))
    with torch.no_grad():
        extension.attached[TASK].parameters[key].fill_(float("nan"))
    before = extension.attached[TASK].state()
    with pytest.raises(Diverged):
        training.step()
    after = extension.attached[TASK].state()
    assert all(torch.equal(before[k].nan_to_num(7), after[k].nan_to_num(7)) for k in before)
    assert extension.attached.active is None
    assert not extension.model.training


def test_rates_warm_up_and_fall() -> None:
    def rates(schedule: str) -> list[float]:
        settings = TrainSettings(steps=6, warmup_steps=2, learning_rate=0.1, lr_schedule=schedule)
        return [round(settings.rate(step), 6) for step in range(6)]

    assert rates("constant") == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert rates("linear") == [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    assert rates("cosine") == [0.05, 0.1, 0.1, 0.085355, 0.05, 0.014645]


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigInvalid) as invalid:
        TrainSettings(steps=0, batch_size=0, learning_rate=1.0, warmup_steps=5, weight_decay=-1, max_grad_norm=0)
    assert [field for field, _ in invalid.value.violations] == [
        "steps", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm",
    ]  # fmt: skip


def test_loss_ignores_prompts_and_padding(extension: LoRAExtension) -> None:
    rows = [([5, 6, 7], [8, 9]), ([10], [11])]
    together = held_out_loss(extension.model, from_pairs(rows, 16, separator=2))
    singles = [from_pairs([row], 16, separator=2) for row in rows]
    counted = [(held_out_loss(extension.model, single), count) for single, count in zip(singles, (3, 2), strict=True)]
    assert together == pytest.approx(sum(loss * count for loss, count in counted) / 5, rel=1e-5)
