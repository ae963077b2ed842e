"""Extensions that become models: what they compute, and that nothing of the base changes on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.extensions.compute.count import distinct_parameters
from services.extensions.compute.merge import KEY, copy_to_train, merge, write_model
from services.extensions.compute.task_extensions import HybridExtension, LoRAExtension
from services.residency.lenses.extension import ExtensionRefused
from services.residency.loading import load_model, load_tokenizer
from tests.models import batch, saved, tiny


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        targets = {"decoder_input_ids": batch(seed=1)} if model.config.is_encoder_decoder else {}
        return model(input_ids=batch(), **targets).logits


def disturbed(extension: LoRAExtension | HybridExtension) -> None:
    generator = torch.Generator().manual_seed(4)
    held = extension.attached["task-one"]
    held.load({key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in held.state().items()})


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5"])
def test_a_merged_model_computes_what_the_extension_does_and_loads_as_a_model(family: str, tmp_path: Path) -> None:
    model = tiny(family, 2)
    base = logits(model)
    layers = (LayerPlacement(position="both" if family == "t5" else "decoder", initialization_scale=0.3),)
    extension = HybridExtension(model, ExtensionConfig(lora_r=4, layers=layers))
    extension.create_hybrid_model("task-one")
    disturbed(extension)
    extended = logits(model)
    extension.switch_to(None)
    merged = merge(model, extension.attached, "task-one")
    assert torch.equal(logits(model), base)
    assert extension.attached.active is None
    assert not [name for name, _ in merged.model.named_modules() if "lora" in name]
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in merged.model.parameters())
    assert 0 < merged.largest_logit_difference < 1e-3
    torch.testing.assert_close(logits(merged.model), extended, rtol=1e-4, atol=1e-4)

    write_model(merged.model, saved(family, 2))(tmp_path / "model")
    loaded = load_model(tmp_path / "model", "none")
    assert torch.equal(logits(loaded), logits(merged.model))
    assert loaded.config.num_hidden_layers == 3
    assert load_tokenizer(tmp_path / "model") is not None


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "adalora"])
def test_every_variant_merges_and_the_difference_is_the_largest_there_is(variant: str) -> None:
    extension = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, lora_variant=variant))
    model = extension.create_adapter("task-one")
    disturbed(extension)
    merged = merge(model, extension.attached, "task-one", batch())
    difference = (logits(merged.model) - logits(model)).abs().max()
    assert merged.largest_logit_difference == float(difference) < 1e-3


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    model = tiny("t5", 2)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    model.config.tie_word_embeddings = False
    extension = LoRAExtension(model, ExtensionConfig(lora_r=4))
    extension.create_adapter("task-one")
    disturbed(extension)
    merged = merge(model, extension.attached, "task-one").model
    write_model(merged)(tmp_path / "model")
    assert torch.equal(logits(load_model(tmp_path / "model", "none")), logits(merged))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_base_is_refused(quantization: str, tmp_path: Path) -> None:
    model = load_model(saved("llama", 2), quantization)
    extension = LoRAExtension(model, ExtensionConfig(lora_r=4, save_path=tmp_path))
    extension.create_adapter("task-one")
    before = logits(model)
    with pytest.raises(ExtensionRefused, match="quantised"):
        merge(model, extension.attached, "task-one")
    with pytest.raises(ExtensionRefused, match="quantised"):
        copy_to_train(model, extension.save("task-one"))
    assert torch.equal(logits(model), before)


def test_layers_of_another_width_are_no_model_of_transformers() -> None:
    extension = HybridExtension(tiny("llama", 2), ExtensionConfig(lora_r=4, layers=(LayerPlacement(mlp_width=5),)))
    extension.create_hybrid_model("task-one")
    with pytest.raises(ExtensionRefused, match="differ in width"):
        merge(extension.model, extension.attached, "task-one")


@pytest.mark.parametrize("kind", ["lora", "hybrid"])
def test_a_base_trained_with_its_extension_is_a_copy_and_becomes_a_model(kind: str, tmp_path: Path) -> None:
    model = tiny("gpt2", 2)
    before, size = logits(model), distinct_parameters(model)
    config = ExtensionConfig(lora_r=4, freeze_base=False)
    folder = tmp_path / "extension"
    folder.mkdir()
    blueprint = Blueprint(kind=kind, task_name="task-one", config=config, base_parameters=size)
    blueprint.prepare(model)(folder)
    counts = blueprint.counts(model)
    assert counts.trainable == size + counts.lora + counts.layer
    own, attached = copy_to_train(model, folder)
    trainable = attached[KEY].trainable
    assert sum(p.numel() for p in trainable.values()) == counts.trainable

    attached.activate(KEY)
    own.requires_grad_(True)
    for parameter in attached[KEY].parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    own(input_ids=batch()).logits.logsumexp(-1).mean().backward()
    assert [key for key, parameter in trainable.items() if parameter.grad is None] == []
    optimizer.step()
    attached.activate(None)
    assert torch.equal(logits(model), before)

    merged = merge(own, attached, KEY).model
    write_model(merged)(tmp_path / "model")
    loaded = load_model(tmp_path / "model", "none")
    with attached.using(KEY):
        torch.testing.assert_close(logits(loaded), logits(own), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), before, atol=1e-2)
