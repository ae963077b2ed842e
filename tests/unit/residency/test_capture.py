"""Hooks leave no trace, stop early, reach through wrappers, and hand out tensors that a backward pass may keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.residency.families import (
    LAYER_ID,
    UnknownHookPoint,
    UnsupportedModel,
    blocks,
    family_of,
    hook_points,
    locate,
    site_of,
)
from services.residency.hooks import capture_hooks
from services.residency.splice import Splice, logits, mean, next_token_loss, reconstruction, spliced, zeros
from tests import models

POINTS = ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def gpt2():
    return models.tiny("gpt2")


def test_the_forward_stops_behind_the_deepest_hook(gpt2):
    ran = []
    for index, block in enumerate(gpt2.transformer.h):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    gpt2.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    asked, caches = {}, []
    gpt2.register_forward_pre_hook(lambda _, __, kwargs: asked.update(kwargs), with_kwargs=True)
    gpt2.transformer.h[0].register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    with capture_hooks(gpt2, family_of(gpt2), POINTS) as capture:
        capture.run(models.batch())
    assert ran == [0, 1]
    assert (asked["use_cache"], caches) == (False, [None])


def test_hooks_are_gone_after_use_and_after_an_exception(gpt2):
    before = hook_count(gpt2)
    plain = logits(gpt2, models.batch())
    with pytest.raises(ZeroDivisionError), capture_hooks(gpt2, family_of(gpt2), POINTS) as capture:
        capture.run(models.batch(), take=lambda _: 1 / 0)
    with pytest.raises(IndexError), capture_hooks(gpt2, family_of(gpt2), POINTS) as capture:
        capture.run(torch.full((1, 4), models.VOCAB + 1))
    assert hook_count(gpt2) == before
    assert torch.equal(logits(gpt2, models.batch()), plain)


def test_an_unknown_name_hooks_nothing(gpt2):
    before = hook_count(gpt2)
    with (
        pytest.raises(UnknownHookPoint, match="layer 9"),
        capture_hooks(gpt2, family_of(gpt2), [*POINTS, "blocks.9.hook_resid_post"]),
    ):
        pytest.fail("entered")
    assert hook_count(gpt2) == before


@pytest.mark.parametrize(
    "name", ["", "blocks.1", "blocks.1.hook_nothing", "block.1.hook_resid_post", "blocks.-.hook_resid_post"]
)
def test_names_that_are_no_hook_points(gpt2, name):
    with pytest.raises(UnknownHookPoint):
        locate(gpt2, family_of(gpt2), name)


def test_sites_name_hook_points_and_back():
    assert hook_points(["mlp_in", "resid_post"], [0, 7]) == [
        "blocks.0.mlp.hook_in",
        "blocks.0.hook_resid_post",
        "blocks.7.mlp.hook_in",
        "blocks.7.hook_resid_post",
    ]
    assert site_of("blocks.7.ln2.hook_out") == (7, "mlp_in")
    assert site_of("blocks.7.hook_mlp_in") == (7, "resid_mid")
    with pytest.raises(UnknownHookPoint, match="no site"):
        hook_points(["mlp"], [0])


def test_captured_tensors_may_be_saved_for_a_backward_pass(gpt2):
    with capture_hooks(gpt2, family_of(gpt2), POINTS) as capture:
        found = capture.run(models.batch())
    weight = torch.ones(models.WIDTH, requires_grad=True)
    (found[POINTS[0]] * weight).sum().backward()
    assert torch.equal(weight.grad, found[POINTS[0]].sum((0, 1)))
    assert not any(tensor.is_inference() for tensor in found.values())
    assert list(found) == POINTS


def test_a_caller_can_select_rows_while_copying(gpt2):
    ids, mask = models.batch(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    with capture_hooks(gpt2, family_of(gpt2), POINTS) as capture:
        rows = capture.run(ids, mask, take=lambda tensor: tensor[mask.bool()])
        short = capture.run(ids[1:, :5])
    assert rows[POINTS[1]].shape == (13, models.WIDTH)
    torch.testing.assert_close(rows[POINTS[1]][8:], short[POINTS[1]][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_padding_on_either_side_gives_the_unpadded_values(family):
    model = models.tiny(family)
    ids = models.batch(1, 10)
    padding = torch.zeros(1, 6, dtype=torch.long)
    ones, zero = torch.ones(1, 10, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
    with capture_hooks(model, family_of(model), POINTS) as capture:
        alone = capture.run(ids)
        right = capture.run(torch.cat([ids, padding], 1), torch.cat([ones, zero], 1))
        left = capture.run(torch.cat([padding, ids], 1), torch.cat([zero, ones], 1))
    for point in POINTS:
        scale = alone[point].norm()
        assert (right[point][:, :10] - alone[point]).norm() / scale < 1e-5
        assert (left[point][:, 6:] - alone[point]).norm() / scale < 1e-5


@pytest.mark.parametrize("family", [*models.FAMILIES, *models.EXPERIMENTAL])
def test_a_sequence_has_the_same_bits_alone_and_among_others_of_its_padded_length(family):
    model, points = models.tiny(family), [*POINTS, "blocks.2.attn.hook_z", "blocks.3.hook_resid_post"]
    ids, mask = models.batch(4, 24), torch.ones(4, 24, dtype=torch.long)
    for row, length in enumerate((24, 17, 9, 3)):
        mask[row, length:] = 0
    with capture_hooks(model, family_of(model), points) as capture:
        together = capture.run(ids, mask)
        for row in range(1, 4):
            alone = capture.run(ids[row : row + 1], mask[row : row + 1])
            real = mask[row].bool()
            assert all(torch.equal(alone[point][0, real], together[point][row, real]) for point in points)


def test_a_lora_wrapped_model_is_read_through_its_wrappers(gpt2):
    from peft import LoraConfig, get_peft_model

    ids = models.batch()
    with capture_hooks(gpt2, family_of(gpt2), hook_points(["mlp_hidden", "mlp_out"], [1])) as capture:
        plain = capture.run(ids)
    wrapped = get_peft_model(gpt2, LoraConfig(target_modules=["c_proj"], r=4, fan_in_fan_out=True))
    wrapped.eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    with capture_hooks(wrapped, family_of(wrapped), hook_points(["mlp_hidden", "mlp_out"], [1])) as capture:
        adapted = capture.run(ids)
    assert adapted.keys() == plain.keys()
    assert not torch.allclose(adapted["blocks.1.hook_mlp_out"], plain["blocks.1.hook_mlp_out"])
    with wrapped.disable_adapter(), capture_hooks(wrapped, family_of(wrapped), list(plain)) as capture:
        assert torch.equal(capture.run(ids)["blocks.1.hook_mlp_out"], plain["blocks.1.hook_mlp_out"])


def test_base_layers_keep_their_ids_when_a_layer_is_inserted():
    import copy

    model = models.tiny("llama")
    family = family_of(model)
    second = blocks(model, family)[1]
    new = copy.deepcopy(second)
    setattr(new, LAYER_ID, "x1")
    model.model.layers.insert(1, new)
    assert list(blocks(model, family)) == [0, "x1", 1, 2, 3]
    assert locate(model, family, "blocks.1.hook_resid_post")[0] is second
    assert locate(model, family, "blocks.x1.hook_resid_post")[0] is new


def test_another_family_is_read_in_a_known_layout():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    family = family_of(Qwen2ForCausalLM(config))
    assert (family.name, family.experimental, family.mlp_norm) == ("qwen2", True, "post_attention_layernorm")


def test_a_model_without_a_known_layout_is_refused_by_what_is_missing():
    from transformers import BartConfig, BartForConditionalGeneration

    small = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    with pytest.raises(UnsupportedModel, match="layers"):
        family_of(BartForConditionalGeneration(BartConfig(**small)))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_splicing_the_true_tensor_changes_nothing_and_zeros_do(family):
    model, ids = models.tiny(family), models.batch()
    layout = family_of(model)
    plain = logits(model, ids)
    with spliced(model, layout, [Splice("blocks.1.hook_mlp_out", lambda y, _: y)]):
        assert torch.equal(logits(model, ids), plain)
    with spliced(model, layout, [zeros("blocks.1.hook_mlp_out")]):
        ablated = logits(model, ids)
    assert not torch.allclose(ablated, plain, atol=1e-3)
    assert torch.equal(logits(model, ids), plain)


def test_a_reconstruction_from_the_source_is_what_flows_on(gpt2):
    mlp, ids = gpt2.transformer.h[2].mlp, models.batch()
    plain = logits(gpt2, ids)
    calls = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return mlp.c_proj(mlp.act(mlp.c_fc(x)))

    with spliced(gpt2, family_of(gpt2), [reconstruction("blocks.2.hook_mlp_out", "blocks.2.mlp.hook_in", decode)]):
        torch.testing.assert_close(logits(gpt2, ids), plain)
    assert calls == [torch.Size([32, models.WIDTH])]
    wrong = reconstruction("blocks.2.hook_mlp_out", "blocks.2.mlp.hook_in", lambda x: x[:, :3])
    with pytest.raises(ValueError, match="replacement"), spliced(gpt2, family_of(gpt2), [wrong]):
        logits(gpt2, ids)
    assert torch.equal(logits(gpt2, ids), plain)


def test_mean_ablation_puts_the_mean_everywhere(gpt2):
    value = torch.arange(models.WIDTH, dtype=torch.float32)
    with (
        spliced(gpt2, family_of(gpt2), [mean("blocks.3.hook_resid_post", value)]),
        capture_hooks(gpt2, family_of(gpt2), ["blocks.3.hook_resid_post"]) as capture,
    ):
        found = capture.run(models.batch())["blocks.3.hook_resid_post"]
    assert torch.equal(found, value.expand_as(found))


def test_a_normalized_site_cannot_be_replaced(gpt2):
    with (
        pytest.raises(ValueError, match="not replaced"),
        spliced(gpt2, family_of(gpt2), [zeros("blocks.1.ln2.hook_normalized")]),
    ):
        logits(gpt2, models.batch())


def test_next_token_loss_counts_real_tokens_with_real_predecessors(gpt2):
    ids = models.batch(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    scores = logits(gpt2, ids, mask)
    losses = next_token_loss(scores, ids, mask)
    expected = -scores.log_softmax(-1)[0, 0, ids[0, 1]]
    assert losses.shape == (5 + 2,)
    torch.testing.assert_close(losses[0], expected)
