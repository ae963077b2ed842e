"""Which modules an adapter may sit on, how new ones begin, and what of PEFT's configuration is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from services.residency.lenses import lora
from services.residency.lenses.extension import ExtensionRefused
from tests.models import WIDTH, tiny


def test_every_linear_module_but_the_head_can_be_adapted() -> None:
    shapes = lora.adaptable(tiny("gpt2", 1))
    assert shapes == {
        "transformer.h.0.attn.c_attn": (WIDTH, 3 * WIDTH),
        "transformer.h.0.attn.c_proj": (WIDTH, WIDTH),
        "transformer.h.0.mlp.c_fc": (WIDTH, 4 * WIDTH),
        "transformer.h.0.mlp.c_proj": (4 * WIDTH, WIDTH),
    }
    assert "lm_head" not in lora.adaptable(tiny("llama", 1))


def test_targets_match_like_peft_does() -> None:
    model = tiny("llama", 2)
    chosen = lora.matched(lora.adaptable(model), ["self_attn.o_proj", "down_proj"])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["self_attn.o_proj", "down_proj"]))
    assert sorted(chosen) == sorted(peft_model.targeted_module_names)


@pytest.mark.parametrize("name", ["q_proj", "attn", "lm_head", "roj", ""])
def test_unknown_targets_are_refused_with_what_the_model_has(name: str) -> None:
    with pytest.raises(ExtensionRefused, match="it has c_attn, c_fc, c_proj") as refused:
        lora.matched(lora.adaptable(tiny("gpt2", 1)), ["c_attn", name])
    assert refused.value.field == "lora.target_modules"


@pytest.mark.parametrize("r", [0, WIDTH + 1])
def test_rank_is_at_least_one_and_at_most_the_matrix(r: int) -> None:
    targets = lora.matched(lora.adaptable(tiny("gpt2", 1)), ["c_attn"])
    lora.require_rank(targets, WIDTH)
    with pytest.raises(ExtensionRefused) as refused:
        lora.require_rank(targets, r)
    assert refused.value.field == "lora.r"


def test_model_types_without_a_default_need_targets() -> None:
    assert lora.default_targets("t5") == ("q", "v")
    with pytest.raises(ExtensionRefused, match="name them"):
        lora.default_targets("unheard_of")


def test_fresh_weights_follow_the_seed_and_pefts_distribution() -> None:
    targets = {"a": (100, 50), "b": (400, 50)}
    weights = lora.fresh_weights(targets, 8, 1)
    again = lora.fresh_weights(targets, 8, 1)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert not torch.equal(
        weights[lora.KEY_PREFIX + "a.lora_A.weight"],
        lora.fresh_weights(targets, 8, 2)[lora.KEY_PREFIX + "a.lora_A.weight"],
    )
    for name, bound in (("a", 0.1), ("b", 0.05)):
        a_RI = weights[f"{lora.KEY_PREFIX}{name}.lora_A.weight"]
        assert 0.95 * bound < a_RI.abs().max() <= bound
        assert torch.equal(weights[f"{lora.KEY_PREFIX}{name}.lora_B.weight"], torch.zeros(50, 8))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "IA3"}, "adapter_config.peft_type"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.modules_to_save"),
        ({"bias": "all"}, "adapter_config.bias"),
        ({"layer_replication": [[0, 2]]}, "adapter_config.layer_replication"),
        ({"something_new": 1}, "adapter_config.something_new"),
    ],
)
def test_configurations_that_are_not_understood_are_refused(tmp_path: Path, changes: dict, field: str) -> None:
    stored = lora.config_json(LoraConfig(r=2, target_modules=["q", "v"]))
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    assert lora.read_config(tmp_path).r == 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | changes))
    with pytest.raises(ExtensionRefused) as refused:
        lora.read_config(tmp_path)
    assert refused.value.field == field


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ExtensionRefused, match="not a JSON object"):
        lora.read_config(tmp_path)
