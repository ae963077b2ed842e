"""What bitsandbytes does on a CPU, with the settings that make it repeatable; estimates and moves to the byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from services.residency.checkpoint import read_headers
from services.residency.estimate import estimate
from services.residency.families import family_of, hook_points
from services.residency.fingerprint import fingerprint
from services.residency.hooks import capture_hooks
from services.residency.loading import load_model, read_config
from services.residency.park import move, relocate
from services.residency.quantize import QUANTIZATIONS, linear_modules, resident_bytes, tensors_of
from services.residency.splice import logits
from tests import models

QUANTIZED = ("int8", "int4")


@pytest.mark.parametrize("family", [*models.FAMILIES, "t5"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_estimate_is_the_truth_to_the_byte(family, quantization):
    path = models.saved(family)
    found = estimate(read_config(path), read_headers(path), quantization, "cpu")
    assert found.resident == resident_bytes(load_model(path, quantization))
    assert found.required == found.resident + found.activations + found.overhead


@pytest.mark.parametrize("family", models.FAMILIES)
def test_only_linear_maps_inside_the_blocks_are_quantised(family):
    plain = models.tiny(family)
    model = load_model(models.saved(family), "int8")
    changed = {n for n, m in model.named_modules() if type(m) is not type(plain.get_submodule(n))}
    assert changed == set(linear_modules(plain))
    assert changed
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.05), ("int4", 0.45)])
def test_quantised_logits_are_near_the_unquantised_ones(family, quantization, error):
    expected = logits(models.tiny(family), models.batch())
    found = logits(load_model(models.saved(family), quantization), models.batch())
    assert 0 < (found - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("family", models.FAMILIES)
def test_int8_gives_a_row_the_same_bits_alone_and_in_a_batch(family):
    model, ids = load_model(models.saved(family), "int8"), models.batch(6, 16)
    points = hook_points(["resid_post"], [3])
    with capture_hooks(model, family_of(model), points) as capture:
        together, alone = capture.run(ids)[points[0]], capture.run(ids[2:3])[points[0]]
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_weights_stay_as_they_are_through_forward_passes(quantization):
    model, ids = load_model(models.saved("llama"), quantization), models.batch()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    first = logits(model, ids)
    model.train()
    in_training = logits(model, ids)
    model.eval()
    if quantization == "int4":  # bitsandbytes' int8 takes another kernel while training, and rounds otherwise there
        assert torch.equal(first, in_training)
    assert torch.equal(logits(model, ids), first)
    after = tensors_of(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name in after)
    assert {name for name in before if name.endswith(".weight")} <= after.keys()


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_lora_gets_gradients_also_after_activations_were_read(quantization):
    from peft import LoraConfig, get_peft_model

    model = load_model(models.saved("llama"), quantization)
    with capture_hooks(model, family_of(model), hook_points(["mlp_in", "mlp_out"], [1])) as capture:
        capture.run(models.batch())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    wrapped(input_ids=models.batch(), labels=models.batch()).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_move_keeps_bits_bytes_and_sharing(family, quantization):
    model = load_model(models.saved(family), quantization)
    print_, held = fingerprint(model), resident_bytes(model)
    before = [tensor.detach() for tensor in tensors_of(model).values()]
    moved = []

    def full(tensor):
        moved.append(tensor)
        return tensor.clone() if len(moved) <= len(before) // 2 else torch.empty(1 << 55)

    with pytest.raises(RuntimeError, match="memory"):
        relocate(model, full)
    assert [tensor.data_ptr() for tensor in tensors_of(model).values()] == [tensor.data_ptr() for tensor in before]
    assert fingerprint(model) == print_
    moved.clear()
    relocate(model, lambda tensor: moved.append(tensor) or tensor.clone())
    assert sum(tensor.numel() * tensor.element_size() for tensor in moved) == held
    after = tensors_of(model).values()
    assert not {t.untyped_storage().data_ptr() for t in before} & {t.untyped_storage().data_ptr() for t in after}
    assert (fingerprint(model), resident_bytes(model)) == (print_, held)


def test_lenses_come_back_when_their_base_cannot_be_moved():
    moves = []
    lens = SimpleNamespace(move=moves.append)
    with pytest.raises(RuntimeError, match="nowhere"):
        move(load_model(models.saved("gpt2"), "none"), [lens, lens], "cpu", "nowhere")
    assert moves == ["nowhere", "nowhere", "cpu", "cpu"]


def test_fingerprints_tell_quantizations_and_weights_apart():
    prints = {
        quantization: fingerprint(load_model(models.saved("gpt2"), quantization)) for quantization in QUANTIZATIONS
    }
    assert len(set(prints.values())) == len(QUANTIZATIONS)
    again = load_model(models.saved("gpt2"), "none")
    assert fingerprint(again) == prints["none"]
    with torch.no_grad():
        again.transformer.h[3].mlp.c_proj.weight[5, 5] += 1e-2
    assert fingerprint(again) != prints["none"]
