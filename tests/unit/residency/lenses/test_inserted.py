"""Inserted layers preserve the function exactly at scale 0, learn, and leave the base as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertLMHeadModel, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from services.residency.lenses import lora
from services.residency.lenses.extension import ExtensionRefused, applied
from services.residency.lenses.inserted import insert, stack_of
from services.residency.loading import load_model
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


@pytest.mark.parametrize("quantization", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("family", "position"), PLACES)
def test_half_precision_and_quantised_bases_keep_every_bit(family: str, position: str, quantization: str) -> None:
    model = load_model(saved(family, 2), quantization)
    before = logits(model)
    extension = insert(model, position, index=1, scale=0.0)
    kept = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(quantization, torch.float32)
    for key, parameter in extension.parameters.items():
        wide = quantization == "fp16" and key.endswith(
            ".wo.weight"
        )  # T5 overflows there, so transformers keeps it wide
        assert parameter.dtype == (torch.float32 if wide else kept), key
    with applied(extension.edits):
        assert torch.equal(logits(model), before)
        own = EncoderDecoderCache(DynamicCache(), DynamicCache()) if family == "t5" else None
        options = {"max_new_tokens": 4, "do_sample": False}
        cached = model.generate(batch(), use_cache=True, past_key_values=own, **options)
    assert torch.equal(logits(model), before)
    assert torch.equal(cached, model.generate(batch(), use_cache=True, **options))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(("family", "path"), [("gpt2", "mlp.c_fc"), ("t5", "layer.1.DenseReluDense.wi_0")])
def test_a_layer_on_a_quantised_base_is_its_dequantised_neighbour(family: str, path: str, quantization: str) -> None:
    model, original = load_model(saved(family, 2), quantization), tiny(family, 2)
    stack = stack_of(model, "decoder" if family == "gpt2" else "encoder")
    key = f"{stack.blocks}.1.{path}.weight"
    copied = insert(model, "decoder" if family == "gpt2" else "encoder", index=1).parameters[key].detach()
    weight = original.get_submodule(f"{stack.blocks}.0.{path}").weight.detach()
    weight = weight.T if family == "gpt2" else weight
    assert 0 < (copied - weight).norm() / weight.norm() < (0.02 if quantization == "int8" else 0.2)
    neighbour = model.get_submodule(f"{stack.blocks}.0.{path}")
    assert (neighbour.in_features, neighbour.out_features) == tuple(reversed(copied.shape))


def test_a_t5_of_fp16_keeps_the_wide_matrix_of_a_quantised_layer_wide() -> None:
    model = load_model(saved("t5", 2), "int8")
    model.get_input_embeddings().half()
    kinds = {key: parameter.dtype for key, parameter in insert(model, "decoder").parameters.items()}
    assert kinds["decoder.block.2.layer.2.DenseReluDense.wo.weight"] == torch.float32
    assert kinds["decoder.block.2.layer.2.DenseReluDense.wi_0.weight"] == torch.float16


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


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_post_norm_models_are_refused_with_the_reason(family: str) -> None:
    sizes = {"vocab_size": 32, "is_decoder": family == "bert"}
    model: PreTrainedModel
    if family == "bert":
        model = BertLMHeadModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **sizes))
    else:
        widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartForConditionalGeneration(BartConfig(d_model=16, **widths, **heads, **sizes))
    with pytest.raises(ExtensionRefused, match="a norm that follows the addition") as refused:
        insert(model, "decoder")
    assert refused.value.field == "model_id"


def test_the_bases_cache_is_right_after_the_layer_left_in_the_middle_of_a_text() -> None:
    """The number of every layer is back, which says where its keys and values are kept."""
    model = tiny("llama", 3)
    ids = batch(1, 12)
    expected = logits_of(model, ids)
    with applied(insert(model, "decoder", index=1, scale=1.0).edits):
        logits_of(model, ids)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(ids[:, :7], past_key_values=cache, use_cache=True).logits
        rest = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=1e-5, atol=1e-5)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def test_attention_that_depends_on_the_layers_number_is_refused() -> None:
    model = tiny("gpt2", 2)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ExtensionRefused, match="depends on each layer's number"):
        insert(model, "decoder")
