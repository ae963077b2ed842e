"""Several tasks in one forward: every row gets what its own adapter gives it, and the base is as before."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from transformers import PreTrainedModel

from services.residency.lenses import lora
from services.residency.lenses.extension import Extension, ExtensionRefused, Extensions
from services.residency.lenses.inserted import insert
from services.residency.lenses.mixed import mixable, rows
from services.residency.loading import load_model
from tests.models import batch, saved, tiny

KEYS = ("a", None, "b", "a", "c")


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        targets = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, use_cache=False, **targets).logits


def adapter(model: PreTrainedModel, targets: list[str], seed: int, r: int, **config: object) -> Extension:
    shapes = lora.matched(lora.adaptable(model), targets)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(tensor.shape, generator=generator) * 0.2
        for key, tensor in lora.fresh_weights(shapes, r, seed).items()
    }
    chosen = LoraConfig(r=r, lora_alpha=8 + seed, lora_dropout=0.1, target_modules=targets, **config)
    return lora.build(model, chosen, weights, fresh=True)


@pytest.fixture(params=["gpt2", "llama", "t5", "int8", "int4"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param in ("int8", "int4"):
        return load_model(saved("llama", 2), request.param)
    return tiny(request.param, 2)


def three(model: PreTrainedModel) -> Extensions:
    """Of unlike ranks, scalings and targets."""
    first, second = {
        "gpt2": ("c_attn", "c_fc"), "t5": ("q", "wo"), "llama": ("q_proj", "down_proj"),
    }[model.config.model_type]  # fmt: skip
    extensions = Extensions()
    extensions.attach("a", adapter(model, [first], 1, 4))
    extensions.attach("b", adapter(model, [first, second], 2, 8, use_rslora=True))
    extensions.attach("c", adapter(model, [second], 3, 2))
    return extensions


def test_each_row_gets_what_its_own_adapter_gives(model: PreTrainedModel) -> None:
    extensions, ids = three(model), batch(len(KEYS))
    modules = dict(model.named_modules())
    bare = logits(model, ids)
    alone = []
    for row, key in enumerate(KEYS):
        with extensions.using(key):
            alone.append(logits(model, ids)[row])
    assert not torch.equal(alone[0], bare[0])
    extensions.attach("layer", insert(model, "decoder", scale=0.5))
    extensions.activate("layer")
    with rows(extensions, KEYS):
        together = logits(model, ids)
    assert extensions.active == "layer"
    extensions.activate(None)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(together[1], bare[1])
    assert torch.equal(logits(model, ids), bare)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is module for path, module in modules.items())


def test_rows_of_one_task_alone_are_its_own_bits() -> None:
    model = tiny("llama", 2)
    extensions, ids = three(model), batch(3)
    with extensions.using("b"):
        alone = logits(model, ids)
    with rows(extensions, ["b"] * 3):
        assert torch.equal(logits(model, ids), alone)


def test_what_is_more_than_lora_is_refused_and_the_active_one_stays() -> None:
    model = tiny("gpt2", 2)
    extensions = three(model)
    shapes = lora.matched(lora.adaptable(model), ["c_attn"])
    adaptive = AdaLoraConfig(init_r=4, target_r=2, total_step=1, target_modules=["c_attn"])
    extensions.attach("layer", insert(model, "decoder"))
    extensions.attach("dora", adapter(model, ["c_attn"], 1, 4, use_dora=True))
    extensions.attach("adalora", lora.build(model, adaptive, lora.fresh_triplets(shapes, 4, 0)))
    extensions.activate("a")
    for key in ("layer", "dora", "adalora"):
        assert not mixable(extensions[key])
        with pytest.raises(ExtensionRefused, match=key), rows(extensions, ["a", key]):
            pass
    with pytest.raises(KeyError), rows(extensions, ["a", "unknown"]):
        pass
    assert extensions.active == "a"


def test_a_batch_of_another_size_is_refused() -> None:
    model = tiny("gpt2", 2)
    with pytest.raises(ValueError, match="adapter_names"), rows(three(model), ["a", "b"]):
        logits(model, batch(3))
