"""int8 and int4 in plain torch, where bitsandbytes cannot run: the same promises, and errors within the same bounds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from services.residency import disk_cache, kernels, quantize
from services.residency.checkpoint import read_headers
from services.residency.disk_cache import DiskCache
from services.residency.estimate import estimate
from services.residency.fingerprint import fingerprint
from services.residency.loading import fill, load_model, prepare, read_config
from services.residency.park import relocate
from services.residency.quantize import is_quantized, resident_bytes
from services.residency.splice import logits
from services.residency.weight_only import NF4, WeightOnlyLinear
from tests import models


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quantize, disk_cache):
        monkeypatch.setattr(module, "kernel_of", lambda quantization, device: kernels.TORCH)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_estimate_is_the_truth_to_the_byte(family: str, quantization: str) -> None:
    path = models.saved(family)
    model = load_model(path, quantization)
    assert estimate(read_config(path), read_headers(path), quantization, "cpu").resident == resident_bytes(model)
    assert is_quantized(model)
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.05), ("int4", 0.45)])
def test_quantised_logits_are_near_the_unquantised_ones(family: str, quantization: str, error: float) -> None:
    expected = logits(models.tiny(family), models.batch())
    found = logits(load_model(models.saved(family), quantization), models.batch())
    assert 0 < (found - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_move_and_the_disk_cache_keep_every_bit(tmp_path: Path, quantization: str) -> None:
    path = models.saved("gpt2")
    model = load_model(path, quantization)
    before = fingerprint(model)
    relocate(model, lambda tensor: tensor.clone())
    assert fingerprint(model) == before
    cache = DiskCache(tmp_path / "quantized", tmp_path / "hub", 1 << 30)
    assert cache.keep(model, "digest", quantization, "cpu")
    kept = cache.find("digest", quantization, "cpu")
    again = fill(prepare(path, quantization), "cpu", lambda done, total: None, kept)
    assert (fingerprint(again), resident_bytes(again)) == (before, resident_bytes(model))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64), (65, 33)])
def test_int4_takes_any_shape_and_is_nearest_in_the_code(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = WeightOnlyLinear.of(weight, "int4", "cpu")
    found = made.dequantized(torch.float32)
    assert found.shape == shape
    widest = max(b - a for a, b in pairwise(NF4))
    assert (found.flatten() - weight.flatten()).abs().max() <= weight.abs().max() * (widest / 2 + 0.02)


def test_the_code_is_nf4() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_lora_trains_on_it(quantization: str) -> None:
    model = load_model(models.saved("gpt2"), quantization)
    before = fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_fc"], r=4))
    wrapped(input_ids=models.batch(), labels=models.batch()).loss.backward()
    gradients = [parameter.grad for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert fingerprint(wrapped.unload()) == before


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_gradient_goes_through_to_what_comes_before(quantization: str) -> None:
    made = WeightOnlyLinear.of(torch.randn(8, 16), quantization, "cpu")
    x = torch.randn(2, 16, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dequantized(torch.float32).sum(0).expand(2, -1))


def test_a_kernel_is_chosen_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.runs("int8", "cpu")
    assert kernels.runs("int4", "cpu")

    def broken(weight: torch.Tensor, **_: object) -> torch.nn.Module:
        raise RuntimeError("Error named symbol not found at line 97 in file /src/csrc/ops.cu")

    def wrong(weight: torch.Tensor, **_: object) -> torch.nn.Module:
        return torch.nn.Linear(64, 64)

    for linear in (broken, wrong):
        monkeypatch.setattr(quantize, "bitsandbytes_linear", linear)
        assert not kernels.runs("int8", "cpu")
