"""Our hook points are TransformerLens' tensors and the HF modules' tensors, exactly, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from services.residency.families import SITES, family_of, hook_points
from services.residency.hooks import capture_hooks
from tests import models

LAYERS = [0, 2, 3]
SAME_ARITHMETIC = ("llama", "mistral", "gemma2")
READABLE = [site for site in SITES if site != "ln2_normalized"]


@pytest.fixture(scope="module", params=models.FAMILIES)
def reference(request):
    """Family, model, ids, TransformerLens' cache, our capture of that same forward, and of a forward by HF alone."""
    from transformer_lens.model_bridge import TransformerBridge

    name, ids = request.param, models.batch(2, 24)
    model = models.tiny(name)
    model.set_attn_implementation("eager")
    family = family_of(model)
    names = hook_points(list(SITES), LAYERS)
    with capture_hooks(model, family, names) as capture:
        alone = capture.run(ids)
    tokenizer = AutoTokenizer.from_pretrained(models.saved(name))
    bridge = TransformerBridge.boot_transformers(
        str(models.saved(name)), hf_model=models.tiny(name), tokenizer=tokenizer, dtype=torch.float32
    )
    inner = bridge.original_model
    with capture_hooks(inner, family, hook_points(READABLE, LAYERS)) as capture, torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        together = {key: value.clone() for key, value in capture.tensors.items()}
    return name, model, ids, cache, together, alone


def test_every_site_is_the_tensor_transformer_lens_names(reference):
    _, _, _, cache, together, _ = reference
    assert len(together) == len(READABLE) * len(LAYERS)
    for hook_point, tensor in together.items():
        assert torch.equal(tensor, cache[hook_point]), hook_point


def test_a_forward_by_hugging_face_alone_gives_transformer_lens_values(reference):
    name, _, _, cache, _, alone = reference
    for hook_point, tensor in alone.items():
        if name in SAME_ARITHMETIC and not hook_point.endswith("hook_normalized"):
            assert torch.equal(tensor, cache[hook_point]), hook_point
        else:  # TransformerLens splits GPT-2's fused matrices and writes LayerNorm anew: other rounding
            torch.testing.assert_close(tensor, cache[hook_point], rtol=2e-5, atol=2e-5)


def test_sites_are_the_inputs_and_outputs_of_the_hugging_face_modules(reference):
    name, model, ids, _, _, alone = reference
    block = (model.transformer.h if name.startswith("gpt") else model.model.layers)[2]
    before = {"gemma2": "pre_feedforward_layernorm", "gpt2": "ln_2", "gpt_neo": "ln_2"}
    norm = getattr(block, before.get(name, "post_attention_layernorm"))
    contribution = block.post_feedforward_layernorm if name == "gemma2" else block.mlp
    seen = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.update(mlp_in=args[0])),
        block.mlp.register_forward_hook(lambda _, __, out: seen.update(mlp_out_raw=out)),
        contribution.register_forward_hook(lambda _, __, out: seen.update(mlp_out=out)),
        norm.register_forward_hook(lambda _, args, out: seen.update(mid=args[0], normed=out)),
    ]
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert torch.equal(alone["blocks.2.mlp.hook_in"], seen["mlp_in"])
    assert torch.equal(alone["blocks.2.mlp.hook_in"], seen["normed"])
    assert torch.equal(alone["blocks.2.mlp.hook_out"], seen["mlp_out_raw"])
    assert torch.equal(alone["blocks.2.hook_mlp_out"], seen["mlp_out"])
    assert torch.equal(alone["blocks.2.hook_resid_mid"], seen["mid"])
    assert torch.equal(alone["blocks.2.hook_resid_pre"], hidden[2])
    assert torch.equal(alone["blocks.2.hook_resid_post"], hidden[3])
    assert torch.equal(alone["blocks.2.hook_resid_mid"] + alone["blocks.2.hook_mlp_out"], hidden[3])


def test_the_contribution_differs_from_the_mlp_only_where_a_norm_follows(reference):
    name, _, _, _, _, alone = reference
    same = torch.equal(alone["blocks.2.hook_mlp_out"], alone["blocks.2.mlp.hook_out"])
    assert same == (name != "gemma2")


def test_rms_normalized_times_gain_is_the_mlps_input_bit_for_bit(reference):
    name, model, _, _, _, alone = reference
    family = family_of(model)
    if not family.rms_norm:
        pytest.skip("LayerNorm adds a bias")
    norm = getattr(model.model.layers[2], family.mlp_norm)
    gain = norm.weight.detach() + family.gain_offset
    assert torch.equal(alone["blocks.2.ln2.hook_normalized"] * gain, alone["blocks.2.mlp.hook_in"])
    if name == "gemma2":  # the raw weight, which TransformerLens 4 calls ln2.w, is not the gain
        raw = alone["blocks.2.ln2.hook_normalized"] * norm.weight.detach()
        assert not torch.allclose(raw, alone["blocks.2.mlp.hook_in"], atol=0.1)


def test_the_pre_norm_hook_is_not_the_site_mlp_in(reference):
    _, model, ids, _, _, alone = reference
    with capture_hooks(model, family_of(model), ["blocks.2.hook_mlp_in", "blocks.2.ln2.hook_out"]) as capture:
        named = capture.run(ids)
    assert torch.equal(named["blocks.2.hook_mlp_in"], alone["blocks.2.hook_resid_mid"])
    assert torch.equal(named["blocks.2.ln2.hook_out"], alone["blocks.2.mlp.hook_in"])
    assert not torch.allclose(named["blocks.2.hook_mlp_in"], alone["blocks.2.mlp.hook_in"], atol=0.1)
