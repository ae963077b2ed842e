"""Attached adapters leave the base alone, active ones change it, detached ones leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from services.residency.lenses import lora
from services.residency.lenses.extension import Edit, Extension, ExtensionRefused, Extensions, applied
from services.residency.loading import load_model
from tests.models import batch, saved, tiny

TARGETS = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "down_proj"], "gemma2": ["v_proj"], "t5": ["q", "wo"]}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            return model(input_ids=batch(), decoder_input_ids=batch(seed=1)).logits
        return model(batch()).logits


def adapter(model: PreTrainedModel, targets: list[str], seed: int = 0, **config: object) -> Extension:
    """An adapter that does something: B is not zero."""
    shapes = lora.matched(lora.adaptable(model), targets)
    weights = lora.fresh_weights(shapes, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {k: torch.randn(v.shape, generator=generator) * 0.1 if "lora_B" in k else v for k, v in weights.items()}
    return lora.build(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config), weights, fresh=True)


def quantized(bits: int) -> PreTrainedModel:
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = AutoModelForCausalLM.from_pretrained(saved("llama", 2), quantization_config=config, device_map="cpu").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    **{family: (lambda family=family: tiny(family, 2)) for family in TARGETS},
    "int8": lambda: quantized(8),
    "int4": lambda: quantized(4),
}


@pytest.mark.parametrize("base", BASES)
def test_base_logits_are_bit_equal_unless_the_extension_is_active(base: str) -> None:
    model = BASES[base]()
    before, modules = logits(model), dict(model.named_modules())
    extensions = Extensions()
    extensions.attach("x", adapter(model, TARGETS.get(base, ["q_proj", "down_proj"])))
    assert torch.equal(logits(model), before)

    extensions.activate("x")
    altered = logits(model)
    assert not torch.equal(altered, before)

    extensions.activate(None)
    assert torch.equal(logits(model), before)
    with extensions.using("x"):
        assert torch.equal(logits(model), altered)
    assert torch.equal(logits(model), before)

    extensions.activate("x")
    extensions.detach("x")
    assert torch.equal(logits(model), before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is module for path, module in modules.items())


def test_two_tasks_on_one_base_do_not_mix() -> None:
    model = tiny("gpt2", 2)
    extensions = Extensions()
    alone = {}
    for seed, name in enumerate(("a", "b")):
        extensions.attach(name, adapter(model, ["c_attn"], seed))
        with extensions.using(name):
            alone[name] = logits(model)
    assert not torch.equal(alone["a"], alone["b"])
    extensions.activate("a")
    with extensions.using("b"):
        assert torch.equal(logits(model), alone["b"])
    assert extensions.active == "a"
    assert torch.equal(logits(model), alone["a"])


def test_activation_follows_the_models_mode_so_that_dropout_is_off_in_eval() -> None:
    model = tiny("gpt2", 2)
    extensions = Extensions()
    extensions.attach("x", adapter(model, ["c_attn"], lora_dropout=0.5))
    extensions.activate("x")
    assert torch.equal(logits(model), logits(model))
    model.train()
    extensions.activate(None)
    model.eval()
    extensions.activate("x")
    assert torch.equal(logits(model), logits(model))


def test_activating_what_is_not_attached_changes_nothing() -> None:
    model = tiny("gpt2", 2)
    extensions = Extensions()
    extensions.attach("x", adapter(model, ["c_attn"]))
    extensions.activate("x")
    active = logits(model)
    with pytest.raises(KeyError):
        extensions.activate("unknown")
    assert extensions.active == "x"
    assert torch.equal(logits(model), active)
    with pytest.raises(KeyError):
        extensions.attach("x", extensions["x"])


def test_bytes_are_those_of_the_adapter_alone() -> None:
    model = tiny("gpt2", 2)
    extensions = Extensions()
    extensions.attach("a", adapter(model, ["c_attn"]))
    extensions.attach("b", adapter(model, ["c_attn"]))
    width = model.config.n_embd
    assert extensions["a"].nbytes == 2 * 4 * (width + 3 * width) * 4
    assert extensions.nbytes == 2 * extensions["a"].nbytes
    extensions.detach("a")
    assert extensions.nbytes == extensions["b"].nbytes


def test_base_parameters_keep_their_requires_grad() -> None:
    model = tiny("gpt2", 2)
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapter(model, ["c_attn"])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_attaching_draws_no_random_numbers() -> None:
    model = tiny("gpt2", 2)
    state = torch.get_rng_state()
    adapter(model, ["c_attn"])
    assert torch.equal(torch.get_rng_state(), state)


def fail(message: str) -> None:
    raise RuntimeError(message)


def test_edits_are_taken_back_in_reverse_when_the_block_raises() -> None:
    owner = nn.Module()
    owner.child = nn.Identity()
    first, second, original = nn.Linear(1, 1), nn.Linear(1, 1), owner.child
    with (
        pytest.raises(RuntimeError, match="was second"),
        applied([Edit(owner, "child", first), Edit(owner, "child", second)]),
    ):
        fail("was second" if owner.child is second else "was not")
    assert owner.child is original


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(damage: str) -> None:
    model = tiny("gpt2", 2)
    before = logits(model)
    weights = lora.fresh_weights(lora.matched(lora.adaptable(model), ["c_attn"]), 4, 0)
    key = next(iter(weights))
    if damage == "missing":
        del weights[key]
    elif damage == "unexpected":
        weights["base_model.model.transformer.h.9.attn.c_attn.lora_A.weight"] = weights[key]
    else:
        weights[key] = weights[key][:, 1:]
    with pytest.raises(ExtensionRefused, match="c_attn") as refused:
        lora.build(model, LoraConfig(r=4, target_modules=["c_attn"]), weights)
    assert refused.value.field == "weights"
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config")


def test_int4_that_would_train_nothing_is_refused() -> None:
    model = quantized(4)
    model.model.layers[1].mlp.up_proj.support_avx512bf16_for_cpu = True
    with pytest.raises(ExtensionRefused, match="support_avx512bf16_for_cpu"):
        adapter(model, ["q_proj"])


def test_dora_on_an_int8_base_is_refused_before_it_breaks_the_base() -> None:
    model = quantized(8)
    before = logits(model)
    with pytest.raises(ExtensionRefused, match="dora cannot read"):
        adapter(model, ["q_proj"], use_dora=True)
    assert torch.equal(logits(model), before)
    model = quantized(4)
    before = logits(model)
    adapter(model, ["q_proj"], use_dora=True)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "adalora"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_adapter_learns_on_a_quantised_base_that_stays_as_it_is(quantization: str, variant: str) -> None:
    if (quantization, variant) == ("int8", "dora"):
        pytest.skip("refused on the CPU: the test below")
    model = load_model(saved("llama", 2), quantization)
    before = logits(model)
    shapes = lora.matched(lora.adaptable(model), ["q_proj", "down_proj"])
    fresh = lora.fresh_triplets if variant == "adalora" else lora.fresh_weights
    config = (
        AdaLoraConfig(init_r=4, target_r=2, total_step=1, target_modules=["q_proj", "down_proj"])
        if variant == "adalora"
        else LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], use_rslora=variant == "rslora", use_dora=variant == "dora"
        )
    )
    extensions = Extensions()
    extensions.attach("x", lora.build(model, config, fresh(shapes, 4, 0), fresh=True))
    with extensions.using("x"):
        model(batch()).logits.logsumexp(-1).mean().backward()
    learns = "lora_E" if variant == "adalora" else "lora_B.weight"
    gradients = [p.grad for key, p in extensions["x"].parameters.items() if key.endswith(learns)]
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert not hasattr(model, "is_loaded_in_8bit")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("quantization", ["fp16", "bf16"])
def test_adapters_of_half_precision_bases_are_wide_as_plain_pefts_are(quantization: str) -> None:
    model = load_model(saved("llama", 2), quantization)
    extension = adapter(model, ["q_proj", "down_proj"])
    assert {parameter.dtype for parameter in extension.parameters.values()} == {torch.float32}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    with applied(extension.edits):
        ours = logits(model)
    plain = get_peft_model(load_model(saved("llama", 2), quantization), config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(extension.parameters[name.replace(".default", "")])
    assert torch.equal(logits(plain), ours)
