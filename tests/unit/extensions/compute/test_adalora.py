"""AdaLoRA: what a fresh adapter is, that training prunes it to its budget as PEFT does, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from services.extensions.compute.adalora import FINAL_SHARE, WARMUP_SHARE, RankBudget
from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.task_extensions import LoRAExtension
from services.residency.lenses.extension import ExtensionRefused
from services.residency.lenses.lora import ADAPTER
from services.residency.loading import load_model
from tests.models import batch, saved, tiny

STEPS = 20
TARGETS = {"gpt2": "c_attn", "llama": "q_proj", "t5": "q"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        targets = {"decoder_input_ids": batch(seed=1)} if model.config.is_encoder_decoder else {}
        return model(input_ids=batch(), **targets).logits


def created(model: PreTrainedModel, **more: object) -> LoRAExtension:
    targets = (TARGETS[model.config.model_type],)
    config = ExtensionConfig(
        lora_r=4, lora_target_r=2, lora_variant="adalora", lora_dropout=0.0, lora_target_modules=targets, **more
    )
    extension = LoRAExtension(model, config)
    extension.create_adapter("task-one")
    return extension


def bases() -> dict:
    return {
        "gpt2": lambda: tiny("gpt2", 2),
        "t5": lambda: tiny("t5", 2),
        "int8": lambda: load_model(saved("llama", 2), "int8"),
        "int4": lambda: load_model(saved("llama", 2), "int4"),
    }


class Loop:
    """A bare training loop over one adapter."""

    def __init__(self, extension: LoRAExtension) -> None:
        self.model, self.active = extension.model, extension.attached["task-one"]
        adapter = self.active.edits[0].value
        assert adapter.lora_E.keys() == {ADAPTER}
        self.optimizer = torch.optim.SGD(self.active.trainable.values(), lr=0.5)
        budget = RankBudget.of(self.active, extension.config, STEPS)
        assert budget is not None
        self.budget = budget

    def run(self, first: int, last: int) -> list[int]:
        """Train; the sum of the ranks after every step."""
        ranks = []
        for step in range(first, last):
            ids = batch(seed=step)
            targets = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}
            scores = self.model(input_ids=ids, **targets).logits.float()
            loss = scores.logsumexp(-1).mean() + self.budget.orthogonality()
            loss.backward()
            self.optimizer.step()
            ranks.append(sum(self.budget.update(step).values()))
            self.optimizer.zero_grad()
        return ranks


@pytest.mark.parametrize("base", bases())
def test_a_fresh_adapter_changes_nothing_and_training_prunes_it_to_its_budget(base: str) -> None:
    model = bases()[base]()
    before = logits(model)
    extension = created(model)
    assert torch.equal(logits(model), before)
    loop = Loop(extension)
    modules = len(extension.attached["task-one"].edits)
    ranks = loop.run(0, STEPS)
    first, last = round(WARMUP_SHARE * STEPS), round((1 - FINAL_SHARE) * STEPS)
    assert set(ranks[: first + 1]) == {0}
    pruned = ranks[first + 1 :]
    assert pruned == sorted(pruned, reverse=True)
    assert ranks[last:] == [2 * modules] * (STEPS - last)
    kept = {key: p for key, p in extension.attached["task-one"].parameters.items() if key.endswith("lora_E")}
    assert len(kept) == modules
    assert sum(int((values != 0).sum()) for values in kept.values()) == 2 * modules
    assert not torch.equal(logits(model), before)
    extension.switch_to(None)
    assert torch.equal(logits(model), before)


def test_the_schedule_is_pefts_own() -> None:
    """The same steps through peft's wrapped model give the same weights."""
    extension = created(tiny("gpt2", 2))
    weights = extension.attached["task-one"].state()
    loop = Loop(extension)
    loop.run(0, STEPS)
    schedule = loop.budget._config
    fresh = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=32, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True,
        total_step=STEPS, tinit=schedule.tinit, tfinal=schedule.tfinal, deltaT=schedule.deltaT,
        task_type="CAUSAL_LM",  # without one peft leaves the orthogonality out
    )  # fmt: skip
    wrapped = get_peft_model(tiny("gpt2", 2), fresh)
    own = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name.replace(".default", "")])
    optimizer = torch.optim.SGD(own.values(), lr=0.5)
    for step in range(STEPS):
        wrapped.eval()
        output = wrapped(input_ids=batch(seed=step), labels=batch(seed=step))
        orthogonality = output.loss - torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch(seed=step)[:, 1:].flatten()
        )
        loss = output.logits.float().logsumexp(-1).mean() + orthogonality
        loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    trained = extension.attached["task-one"].parameters
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, trained[name.replace(".default", "")], rtol=1e-3, atol=1e-5)


def test_it_resumes_where_it_was() -> None:
    through = created(tiny("gpt2", 2))
    Loop(through).run(0, STEPS)

    first = created(tiny("gpt2", 2))
    before = Loop(first)
    before.run(0, 9)
    weights, (tensors, facts) = first.attached["task-one"].state(), before.budget.state()
    again = created(tiny("gpt2", 2))
    again.attached["task-one"].load(weights)
    after = Loop(again)
    after.budget.restore(tensors, facts)
    after.run(9, STEPS)
    for key, parameter in through.attached["task-one"].parameters.items():
        assert torch.equal(again.attached["task-one"].parameters[key], parameter), key


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_plain_peft_loads_what_is_saved_with_equal_logits(family: str, tmp_path: Path) -> None:
    extension = created(tiny(family, 2), save_path=tmp_path)
    Loop(extension).run(0, STEPS)
    folder = extension.save("task-one")
    plain = PeftModel.from_pretrained(tiny(family, 2), folder / "lora").eval()
    assert torch.equal(logits(plain), logits(extension.model))
    other = LoRAExtension(tiny(family, 2), extension.config)
    assert torch.equal(logits(other.switch_to(other.load(folder))), logits(extension.model))


def test_only_adalora_has_a_budget_and_it_needs_steps() -> None:
    extension = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4))
    extension.create_adapter("task-one")
    assert RankBudget.of(extension.attached["task-one"], extension.config, 100) is None
    adaptive = created(tiny("gpt2", 2))
    with pytest.raises(ExtensionRefused, match="too few"):
        RankBudget.of(adaptive.attached["task-one"], adaptive.config, 0)
