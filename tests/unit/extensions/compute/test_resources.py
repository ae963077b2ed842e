"""Devices, dtypes and bytes: chosen and known before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.resources import automatic_device, automatic_dtype, place
from services.extensions.compute.task_extensions import HybridExtension
from services.residency.loading import load_model
from tests.models import batch, saved, tiny


@pytest.mark.parametrize(
    ("model_type", "device", "bf16", "expected"),
    [
        ("gpt2", "cpu", True, torch.float32),
        ("t5", "cpu", True, torch.float32),
        ("llama", "cuda:0", False, torch.float16),
        ("llama", "cuda:1", True, torch.float16),
        ("t5", "cuda:0", True, torch.bfloat16),
        ("t5", "cuda:0", False, torch.float32),
    ],
)
def test_the_dtype_follows_the_model_and_the_device(
    monkeypatch: pytest.MonkeyPatch, model_type: str, device: str, bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert automatic_dtype(model_type, device) is expected


def test_the_device_is_the_first_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert automatic_device() == expected


def test_a_base_is_brought_to_its_device_in_the_dtype_that_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny("llama", 2).to(torch.bfloat16)
    extension = HybridExtension(model, ExtensionConfig(lora_r=2), device="auto")
    assert extension.model is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    left = HybridExtension(tiny("llama", 2).to(torch.bfloat16), ExtensionConfig(lora_r=2))
    assert left.model.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_base_keeps_its_bits(quantization: str) -> None:
    model = load_model(saved("llama", 2), quantization)
    with torch.inference_mode():
        before = model(batch()).logits
        assert torch.equal(place(model, "cpu")(batch()).logits, before)
