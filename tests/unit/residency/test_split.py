"""A model over several devices. On a CPU all of them are `cpu`; tests/gpu moves tensors between real ones."""

from __future__ import annotations

import pytest
import torch

from services.residency.estimate import laid_out
from services.residency.families import blocks, family_of
from services.residency.loading import load_model, prepare
from services.residency.quantize import resident_bytes
from services.residency.splice import logits
from services.residency.split import device_map, load_split, number_of
from tests import models


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_whole_blocks_lie_evenly_over_the_devices_and_tied_weights_together(family: str) -> None:
    prepared = prepare(models.saved(family, 8), "none")
    spread, held = device_map(prepared, 2, 0, "cpu")
    model = prepared.model
    form = (prepared.entries, prepared.quantization, prepared.dtype, "cpu")
    assert sum(held) == laid_out(model, *form).weights
    paths = {id(module): path for path, module in model.named_modules()}
    numbers = []
    for block in blocks(model, family_of(model)).values():
        inside = {number_of(f"{paths[id(block)]}.{name}", spread) for name, _ in block.named_parameters()}
        assert len(inside) == 1
        numbers += inside
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1}
    largest = sum(parameter.nbytes for parameter in block.parameters())
    assert abs(held[0] - held[1]) <= 2 * largest
    if model.config.tie_word_embeddings:
        assert number_of("lm_head.weight", spread) == 0


def test_what_something_else_takes_of_the_first_device_is_made_up_by_the_others() -> None:
    prepared = prepare(models.saved("llama", 8), "none")
    _, even = device_map(prepared, 3, 0, "cpu")
    _, held = device_map(prepared, 3, even[0], "cpu")
    assert held[0] < even[0] / 2
    assert sum(held) == sum(even)
    assert max(held[0] + even[0], *held[1:]) < 1.5 * sum(even) / 2


def test_quantised_weights_are_counted_as_what_they_take() -> None:
    form = (models.saved("llama"), "int8")
    _, held = device_map(prepare(*form), 2, 0, "cpu")
    assert sum(held) == resident_bytes(load_model(*form))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_split_model_computes_the_same_bits(family: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = models.saved(family)
    spread, _ = device_map(prepare(folder, "none"), 2, 0, "cpu")
    split = load_split(folder, "none", spread, ("cpu", "cpu"))
    assert caplog.messages == []  # accelerate would warn of devices that it does not see
    assert {path for path, module in split.named_modules() if hasattr(module, "_hf_hook")} >= set(spread)
    whole = load_model(folder, "none")
    assert torch.equal(logits(split, models.batch()), logits(whole, models.batch()))
    assert split.state_dict().keys() == whole.state_dict().keys()
