"""What `capture` hands out is bit for bit what the model's own modules are given and return."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from services.extraction.compute import capture, identity_errors, paired_layers
from services.residency.families import UnknownHookPoint, UnsupportedModel, family_of
from services.residency.identity import IdentityFailed
from tests import models

SMALL = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
POINTS = ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", "blocks.0.hook_resid_post"]


def modules(model, layer):
    """(block, mlp, what the layer's MLP branch adds) of layer `layer`, named by hand for each family."""
    if hasattr(model, "transformer"):
        block = model.transformer.h[layer]
        return block, block.mlp, block.mlp
    block = model.model.layers[layer]
    return block, block.mlp, getattr(block, "post_feedforward_layernorm", block.mlp)


def reference(model, ids, mask):
    """POINTS of a plain forward pass, read by hooks of this test's own."""
    seen = {}

    def keep(name, tensor):
        seen[name] = tensor[0] if isinstance(tensor, tuple) else tensor

    _, mlp, contribution = modules(model, 2)
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: keep(POINTS[0], args)),
        contribution.register_forward_hook(lambda _, __, output: keep(POINTS[1], output)),
        modules(model, 0)[0].register_forward_hook(lambda _, __, output: keep(POINTS[2], output)),
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ragged():
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 1:] = 0
    return models.batch(3, 12), mask


@pytest.mark.parametrize("family", models.FAMILIES)
def test_captured_values_are_the_modules_own(family):
    model = models.tiny(family)
    (ids, mask), full = ragged(), models.batch(2, 9, seed=1)
    found = list(capture(model, [(ids, mask), full], POINTS))
    for batch, (batch_ids, batch_mask) in zip(found, [(ids, mask), (full, torch.ones_like(full))], strict=True):
        expected = reference(model, batch_ids, batch_mask)
        assert list(batch) == POINTS
        for name in POINTS:
            assert torch.equal(batch[name], expected[name][batch_mask.bool()])
    assert [len(batch[POINTS[0]]) for batch in found] == [12 + 7 + 1, 18]


def test_between_batches_the_model_is_as_it_was():
    model = models.tiny("gpt2")
    before = hooks(model)
    stream = capture(model, [models.batch(), models.batch(seed=1)], POINTS)
    next(stream)
    assert hooks(model) == before
    next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert hooks(model) == before


def test_a_wrong_request_is_refused_before_any_batch_is_taken():
    def batches():
        pytest.fail("a batch was taken")
        yield models.batch()

    with pytest.raises(UnknownHookPoint):
        capture(models.tiny("gpt2"), batches(), ["blocks.7.mlp.hook_in"])
    with pytest.raises(UnsupportedModel):
        capture(BartForConditionalGeneration(BartConfig(**SMALL)), batches(), POINTS)


def test_pairs_are_found_by_layer():
    points = ["blocks.3.hook_mlp_out", *POINTS, "blocks.1.mlp.hook_in", "blocks.3.ln2.hook_out"]
    assert paired_layers(points) == [3, 2]
    assert paired_layers(["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out"]) == [1]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_pair_that_is_none_is_found(family):
    model = models.tiny(family)
    ids, mask = ragged()
    assert identity_errors(model, family_of(model), POINTS, ids, mask) == {"2": 0.0}
    assert identity_errors(model, family_of(model), POINTS[2:], ids, mask) == {}
    calls = itertools.count()
    _, _, contribution = modules(model, 2)
    contribution.register_forward_hook(lambda _, __, output: output + 0.001 * next(calls))
    with pytest.raises(IdentityFailed, match="layer 2"):
        identity_errors(model, family_of(model), POINTS, ids, mask)
