"""Inserted layers preserve the function exactly at scale 0, learn, and leave the base as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BitsAndBytesConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from services.residency.lenses import lora
from services.residency.lenses.extension import ExtensionRefused, applied
from services.residency.lenses.inserted import insert
from tests.models import batch, saved, tiny

PLACES = [("gpt2", "decoder"), ("llama", "decoder"), ("mistral", "decoder"), ("gemma2", "decoder")]
PLACES += [("t5", "encoder"), ("t5", "decoder")]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            return model(input_ids=batch(), decoder_input_ids=batch(seed=1)).logits
        return model(batch()).logits


def facts(model: PreTrainedModel) -> list[object]:
    """Everything that an insertion might leave changed."""
    modules = dict(model.named_modules())
    numbers = {path: module.layer_idx for path, module in modules.items() if hasattr(module, "layer_idx")}
    configs = [module.config.to_json_string() for module in modules.values() if hasattr(module, "config")]
    return [list(modules), [id(module) for module in modules.values()], numbers, configs]


@pytest.mark.parametrize("index", [1, 2, None])
@pytest.mark.parametrize(("family", "position"), PLACES)
def test_scale_zero_preserves_every_bit_and_the_base_is_left_alone(
    family: str, position: str, index: int | None
) -> None:
    model = tiny(family, 3)
    before, state = logits(model), facts(model)
    extension = insert(model, position, index=index, scale=0.0)
    assert facts(model) == state
    with applied(extension.edits):
        assert torch.equal(logits(model), before)
        numbers = {path: m.layer_idx for path, m in model.named_modules() if getattr(m, "layer_idx", None) is not None}
        for path, number in numbers.items():
            if path.startswith(("transformer.h.", "model.layers.", f"{position}.block.")):
                assert number == int(path.split(".")[2]), path
    assert facts(model) == state
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("scale", [0.01, 0.1])
@pytest.mark.parametrize(("family", "position"), PLACES)
def test_the_scale_says_how_much_the_layer_adds(family: str, position: str, scale: float) -> None:
    """Also where a norm follows the branch, which would undo a factor on the projection before it."""
    model = tiny(family, 3)
    before = logits(model)

    def distance(factor: float) -> float:
        with applied(insert(model, position, index=2, scale=factor).edits):
            return float((logits(model) - before).norm())

    assert 0 < distance(scale) < 0.8 * distance(2 * scale)


@pytest.mark.parametrize(("family", "position"), PLACES)
def test_generation_with_cache_equals_generation_without(family: str, position: str) -> None:
    model = tiny(family, 3)
    with applied(insert(model, position, index=2, scale=0.5).edits):
        own = EncoderDecoderCache(DynamicCache(), DynamicCache()) if family == "t5" else None
        options = {"max_new_tokens": 6, "do_sample": False}
        cached = model.generate(batch(), use_cache=True, past_key_values=own, **options)
        assert torch.equal(cached, model.generate(batch(), use_cache=False, **options))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bases_get_an_unquantised_layer(bits: int) -> None:
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = AutoModelForCausalLM.from_pretrained(saved("gpt2", 2), quantization_config=config, device_map="cpu").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    before = logits(model)
    extension = insert(model, "decoder", index=1, scale=0.0)
    assert {parameter.dtype for parameter in extension.parameters.values()} == {torch.float32}
    original = tiny("gpt2", 2).transformer.h[0].mlp.c_fc.weight.T
    copied = extension.parameters["transformer.h.1.mlp.c_fc.weight"].detach()
    assert float((copied - original).norm() / original.norm()) < (0.02 if bits == 8 else 0.2)
    with applied(extension.edits):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("family", "position"), PLACES)
def test_only_the_outputs_learn_at_first_and_everything_after(family: str, position: str) -> None:
    model = tiny(family, 2)
    extension = insert(model, position, scale=0.0)
    optimizer = torch.optim.SGD(extension.parameters.values(), lr=1.0)
    with applied(extension.edits):
        for step in range(2):
            kinds = {"decoder_input_ids": batch(seed=1)} if family == "t5" else {}
            model(input_ids=batch(), **kinds).logits.float().square().mean().backward()
            moved = {key for key, p in extension.parameters.items() if p.grad is not None and p.grad.norm() > 0}
            if step == 0 and family != "gemma2":
                ends = ("o.weight", "wo.weight", "o_proj.weight", "down_proj.weight", "c_proj.weight", "c_proj.bias")
                assert moved
                assert all(key.endswith(ends) for key in moved)
            optimizer.step()
            optimizer.zero_grad()
    norms = [key for key in extension.parameters if "norm" in key or ".ln_" in key]
    assert moved >= set(extension.parameters) - set(norms)


def test_a_copy_of_t5s_first_block_does_not_bring_its_position_bias() -> None:
    extension = insert(tiny("t5", 2), "encoder", index=1)
    assert not [key for key in extension.parameters if "relative_attention_bias" in key]


def test_weights_are_loaded_strictly() -> None:
    model = tiny("llama", 2)
    weights = insert(model, "decoder", index=1, scale=0.5).state()
    again = insert(model, "decoder", index=1, weights=weights)
    assert all(torch.equal(again.parameters[key], weights[key]) for key in weights)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ExtensionRefused, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        insert(model, "decoder", index=1, weights=weights)


def test_adapters_reach_the_inserted_layer_too() -> None:
    model = tiny("llama", 2)
    with applied(insert(model, "decoder", scale=0.0).edits):
        assert len(lora.matched(lora.adaptable(model), ["q_proj"])) == 3
    assert len(lora.matched(lora.adaptable(model), ["q_proj"])) == 2


@pytest.mark.parametrize(
    ("family", "position", "index", "field"),
    [
        ("gpt2", "encoder", None, "layer.position"),
        ("t5", "encoder", 0, "layer.index"),
        ("t5", "decoder", 3, "layer.index"),
        ("gpt_neo", "decoder", None, "model_id"),
    ],
)
def test_what_cannot_be_inserted_names_the_field(family: str, position: str, index: int | None, field: str) -> None:
    with pytest.raises(ExtensionRefused) as refused:
        insert(tiny(family, 2), position, index=index)
    assert refused.value.field == field


def test_post_norm_models_are_refused() -> None:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    with pytest.raises(ExtensionRefused, match="no layer of bert is known to preserve"):
        insert(BertLMHeadModel(config), "decoder")


def test_attention_that_depends_on_the_layers_number_is_refused() -> None:
    model = tiny("gpt2", 2)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ExtensionRefused, match="depends on each layer's number"):
        insert(model, "decoder")
