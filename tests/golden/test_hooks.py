"""Our hook points are TransformerLens' tensors and the HF modules' tensors, exactly, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from services.residency.families import HEAD_SITES, facts, family_of, hook_points
from services.residency.hooks import capture_hooks
from tests import models

LAYERS = [0, 2, 3]
SAME_ARITHMETIC = ("llama", "mistral", "gemma2")
OWN_ATTENTION = ("gpt2", "gpt_neo", "bloom", "falcon", "falcon_serial")
"""TransformerLens puts attention modules of its own in place of theirs."""
CHANGED_IN_PLACE = ("falcon",)
NORMALIZED = "ln2_normalized"


def bridged(name, model):
    """TransformerLens' view of a model."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(models.saved(name))
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        str(models.saved(name)), hf_model=model, tokenizer=tokenizer, dtype=torch.float32
    )


def readable(name, family):
    """Sites whose tensors also exist in the forward that TransformerLens runs."""
    own = HEAD_SITES if name in OWN_ATTENTION else ()
    return [site for site in family.taps if site not in (NORMALIZED, *own)]


def beside(name, ids):
    """TransformerLens' cache, and our capture of that same forward."""
    bridge = bridged(name, models.tiny(name))
    inner = bridge.original_model
    family = family_of(inner)
    with capture_hooks(inner, family, hook_points(readable(name, family), LAYERS)) as capture, torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        return cache, {key: value.clone() for key, value in capture.tensors.items()}


@pytest.fixture(scope="module", params=[*models.FAMILIES, *models.EXPERIMENTAL])
def captured(request):
    """Family, model, ids, our capture of a forward by Hugging Face alone."""
    name, ids = request.param, models.batch(2, 24)
    model = models.tiny(name)
    model.config._attn_implementation = "eager"
    family = family_of(model)
    with capture_hooks(model, family, hook_points(list(family.taps), LAYERS)) as capture:
        alone = capture.run(ids)
    return name, model, ids, alone


@pytest.fixture(scope="module")
def reference(captured):
    """Family, TransformerLens' cache, our capture of that same forward, and of one by Hugging Face alone."""
    name, _, ids, alone = captured
    if name == "falcon_grouped":
        pytest.skip("TransformerLens 4.3 cannot split the matrix of Falcon's grouped queries")
    return name, *beside(name, ids), alone


def like_ours(theirs, hook_point):
    """[B, S, heads, d_head] and [B, heads, S, S] of TransformerLens as we lay them out."""
    if hook_point.endswith("hook_pattern"):
        return theirs.transpose(1, 2)
    return theirs.flatten(2)


def test_every_site_is_the_tensor_transformer_lens_names(reference):
    name, cache, together, alone = reference
    sites = len(alone) // len(LAYERS)
    assert len(together) >= len(LAYERS) * (sites - 1 - (len(HEAD_SITES) if name in OWN_ATTENTION else 0))
    for hook_point, tensor in together.items():
        if name in CHANGED_IN_PLACE and hook_point.endswith(("mlp_out", "mlp.hook_out")):
            continue  # read after the pass here, and Falcon adds the attention's output to it
        assert torch.equal(tensor, like_ours(cache[hook_point], hook_point)), hook_point


def test_a_forward_by_hugging_face_alone_gives_transformer_lens_values(reference):
    name, cache, _, alone = reference
    for hook_point, tensor in alone.items():
        if name in SAME_ARITHMETIC and not hook_point.endswith("hook_normalized"):
            assert torch.equal(tensor, like_ours(cache[hook_point], hook_point)), hook_point
        else:  # TransformerLens splits fused matrices and writes LayerNorm anew: other rounding
            torch.testing.assert_close(tensor, like_ours(cache[hook_point], hook_point), rtol=2e-5, atol=2e-5)


BEFORE_THE_MLP = {
    **dict.fromkeys(("gpt2", "gpt_neo"), "ln_2"),
    "gptj": "ln_1",
    "gemma2": "pre_feedforward_layernorm",
    "falcon": "input_layernorm",
    "falcon_grouped": "ln_mlp",
}


def block_of(model, layer):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[layer]


def test_sites_are_the_inputs_and_outputs_of_the_hugging_face_modules(captured):
    name, model, ids, alone = captured
    block = block_of(model, 2)
    norm = getattr(block, BEFORE_THE_MLP.get(name, "post_attention_layernorm"))
    contribution = {"gemma2": "post_feedforward_layernorm", "bloom": "mlp.dense_4h_to_h"}.get(name, "mlp")
    seen = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.update(mlp_in=args[0])),
        block.mlp.register_forward_hook(lambda _, __, out: seen.update(mlp_out_raw=out.clone())),
        block.get_submodule(contribution).register_forward_hook(lambda _, __, out: seen.update(mlp_out=out.clone())),
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
    assert torch.equal(alone["blocks.2.hook_resid_pre"], hidden[2])
    assert torch.equal(alone["blocks.2.hook_resid_post"], hidden[3])
    if "blocks.2.hook_resid_mid" in alone:
        assert torch.equal(alone["blocks.2.hook_resid_mid"], seen["mid"])
        assert torch.equal(alone["blocks.2.hook_resid_mid"] + alone["blocks.2.hook_mlp_out"], hidden[3])
    else:
        parts = [alone[f"blocks.2.{name}"] for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        torch.testing.assert_close(sum(parts), hidden[3], rtol=1e-6, atol=1e-5)


def heads_by_hugging_face(name, block, x):
    """q, k, v of attention input `x` as the module itself takes them apart, [B, S, heads * d_head] each."""
    if name == "gpt2":
        return block.attn.c_attn(x).split(models.WIDTH, dim=2)
    if name in ("gptj", "gpt_neo"):
        attention = block.attn if name == "gptj" else block.attn.attention
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    if hasattr(block, "self_attn"):
        return block.self_attn.q_proj(x), block.self_attn.k_proj(x), block.self_attn.v_proj(x)
    fused = block.self_attention.query_key_value(x)
    if name == "bloom":
        return [part.transpose(1, 2).flatten(2) for part in block.self_attention._reshape(fused)]
    q, k, v = block.self_attention._split_heads(fused)
    if name == "falcon_grouped":  # each of the two heads of keys is repeated for its two heads of queries
        k, v = k[:, :, ::2], v[:, :, ::2]
    return [part.flatten(2) for part in (q, k, v)]


def test_heads_and_patterns_are_those_of_the_attention_module(captured):
    name, model, ids, alone = captured
    block = block_of(model, 2)
    attention = next(
        child for child_name, child in block.named_children() if "att" in child_name and "norm" not in child_name
    )
    out = {"gpt2": "c_proj", "gpt_neo": "attention.out_proj", "gptj": "out_proj"}.get(name)
    out = out or ("dense" if hasattr(attention, "dense") else "o_proj")
    seen = {}
    handles = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        attention.get_submodule(out).register_forward_pre_hook(lambda _, args: seen.update(z=args[0])),
    ]
    with torch.no_grad():
        patterns = model(ids, use_cache=False, output_attentions=True).attentions
        q, k, v = heads_by_hugging_face(name, block, seen["x"])
    for handle in handles:
        handle.remove()
    assert torch.equal(alone["blocks.2.attn.hook_q"], q)
    assert torch.equal(alone["blocks.2.attn.hook_k"], k)
    assert torch.equal(alone["blocks.2.attn.hook_v"], v)
    assert torch.equal(alone["blocks.2.attn.hook_z"], seen["z"])
    assert torch.equal(alone["blocks.2.attn.hook_pattern"], patterns[2].transpose(1, 2))
    known = facts(model.config.to_dict())
    widths = {"q": known.num_heads, "k": known.num_kv_heads, "v": known.num_kv_heads, "z": known.num_heads}
    for site, heads in widths.items():
        assert alone[f"blocks.2.attn.hook_{site}"].shape[-1] == heads * known.head_dim


def test_a_pattern_is_read_where_attention_is_not_eager_and_the_model_stays_as_it_was():
    model, ids = models.tiny("llama"), models.batch(2, 24)
    model.config._attn_implementation = "sdpa"
    with capture_hooks(model, family_of(model), ["blocks.1.attn.hook_pattern"]) as capture:
        pattern = capture.run(ids)["blocks.1.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 24, 4))
    assert not pattern.transpose(1, 2).triu(1).any()
    assert model.config._attn_implementation == "sdpa"


def test_the_contribution_differs_from_the_mlp_only_where_something_follows(captured):
    name, _, _, alone = captured
    same = torch.equal(alone["blocks.2.hook_mlp_out"], alone["blocks.2.mlp.hook_out"])
    assert same == (name not in ("gemma2", "bloom"))


def test_rms_normalized_times_gain_is_the_mlps_input_bit_for_bit(captured):
    name, model, _, alone = captured
    family = family_of(model)
    if not family.rms_norm:
        pytest.skip("LayerNorm adds a bias")
    norm = getattr(model.model.layers[2], family.mlp_norm)
    gain = norm.weight.detach() + family.gain_offset
    assert torch.equal(alone["blocks.2.ln2.hook_normalized"] * gain, alone["blocks.2.mlp.hook_in"])
    if name == "gemma2":  # the raw weight, which TransformerLens 4 calls ln2.w, is not the gain
        raw = alone["blocks.2.ln2.hook_normalized"] * norm.weight.detach()
        assert not torch.allclose(raw, alone["blocks.2.mlp.hook_in"], atol=0.1)


def test_the_pre_norm_hook_is_not_the_site_mlp_in(captured):
    _, model, ids, alone = captured
    if "blocks.2.hook_resid_mid" not in alone:
        pytest.skip("attention and MLP run side by side")
    with capture_hooks(model, family_of(model), ["blocks.2.hook_mlp_in", "blocks.2.ln2.hook_out"]) as capture:
        named = capture.run(ids)
    assert torch.equal(named["blocks.2.hook_mlp_in"], alone["blocks.2.hook_resid_mid"])
    assert torch.equal(named["blocks.2.ln2.hook_out"], alone["blocks.2.mlp.hook_in"])
    assert not torch.allclose(named["blocks.2.hook_mlp_in"], alone["blocks.2.mlp.hook_in"], atol=0.1)


def test_an_encoders_sites_are_the_inputs_and_outputs_of_its_modules():
    model, ids, layer = models.tiny("t5"), models.batch(2, 24), 2
    family, mask = family_of(model), torch.ones(2, 24, dtype=torch.long)
    mask[1, 9:] = 0
    block, seen, decoded = model.encoder.block[layer], {}, []
    attention, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense

    def given(name):
        return lambda _, args: seen.update({name: args[0]})

    def returned(name):
        return lambda _, __, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    handles = [
        block.register_forward_pre_hook(given("hook_resid_pre")),
        block.register_forward_hook(returned("hook_resid_post")),
        block.layer[1].layer_norm.register_forward_pre_hook(given("hook_resid_mid")),
        attention.register_forward_hook(returned("hook_attn_out")),
        attention.o.register_forward_pre_hook(given("attn.hook_z")),
        *(getattr(attention, part).register_forward_hook(returned(f"attn.hook_{part}")) for part in "qkv"),
        mlp.register_forward_pre_hook(given("mlp.hook_in")),
        mlp.register_forward_hook(returned("mlp.hook_out")),
        mlp.wo.register_forward_pre_hook(given("mlp.hook_post")),
    ]
    with torch.no_grad():
        model.encoder(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    model.decoder.register_forward_hook(lambda *_: decoded.append(1))
    points = hook_points(list(family.taps), [layer])
    with capture_hooks(model, family, points) as capture:
        found = capture.run(ids, mask)
        alone = capture.run(ids[1:], mask[1:])
    assert decoded == []
    for name, tensor in seen.items():
        assert torch.equal(found[f"blocks.{layer}.{name}"], tensor), name
    assert len(seen) == len(points) - 2, "all but the contribution, and the norm without its gain"
    assert torch.equal(found[f"blocks.{layer}.hook_mlp_out"], seen["mlp.hook_out"])
    assert torch.equal(seen["hook_resid_mid"] + seen["mlp.hook_out"], seen["hook_resid_post"])
    gain = block.layer[1].layer_norm.weight.detach()
    assert torch.equal(found[f"blocks.{layer}.ln2.hook_normalized"] * gain, seen["mlp.hook_in"])
    for point in points:
        assert torch.equal(alone[point][0, :9], found[point][1, :9]), point


def test_an_encoders_sites_are_the_tensors_transformer_lens_names():
    model, ids = models.tiny("t5"), models.batch(2, 24)
    cache, together = beside("t5", ids)
    with capture_hooks(model, family_of(model), list(together)) as capture:
        alone = capture.run(ids)
    # All but the normalized tensor: TransformerLens 4.3 centres it as a LayerNorm would, which the model does not do.
    assert len(together) == len(LAYERS) * (len(family_of(model).taps) - 1)
    for hook_point, tensor in together.items():
        theirs = like_ours(cache[f"encoder_{hook_point}"], hook_point)
        assert torch.equal(tensor, theirs), hook_point
        torch.testing.assert_close(alone[hook_point], theirs, rtol=2e-5, atol=2e-5)
