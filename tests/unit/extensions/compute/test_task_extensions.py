"""Adapters as notebooks use them: create, switch, save; plain PEFT reads what is saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from services.extensions.compute.config import ConfigInvalid, ExtensionConfig, require_task_name
from services.extensions.compute.kinds import KINDS
from services.extensions.compute.task_extensions import HybridExtension, LoRAExtension, TransformerLayerExtension
from services.residency.lenses.extension import ExtensionRefused
from services.residency.lenses.extension_files import attachable, read_manifest
from tests.models import batch, tiny


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            return model(input_ids=batch(), decoder_input_ids=batch(seed=1)).logits
        return model(input_ids=batch()).logits


def trained(family: str, tmp_path: Path, **config: object) -> LoRAExtension:
    """An active adapter whose every weight is random."""
    extension = LoRAExtension(tiny(family, 2), ExtensionConfig(lora_r=4, save_path=tmp_path / "saved", **config))
    extension.create_adapter("task-one")
    generator = torch.Generator().manual_seed(4)
    weights = extension.attached["task-one"].state()
    extension.attached["task-one"].load(
        {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    )
    return extension


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_plain_peft_loads_what_is_saved_with_equal_logits(family: str, variant: str, tmp_path: Path) -> None:
    extension = trained(family, tmp_path, lora_variant=variant)
    folder = extension.save("task-one")
    peft_model = PeftModel.from_pretrained(tiny(family, 2), folder / "lora")
    assert torch.equal(logits(peft_model.eval()), logits(extension.model))
    extension.switch_to(None)
    assert not torch.equal(logits(extension.model), logits(peft_model))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_saving_and_loading_is_exact(variant: str, tmp_path: Path) -> None:
    extension = trained("gpt2", tmp_path, lora_variant=variant)
    folder = extension.save("task-one")
    other = LoRAExtension(tiny("gpt2", 2), extension.config)
    base = logits(other.model)
    assert other.load(folder) == "task-one"
    assert torch.equal(logits(other.model), base)
    assert torch.equal(logits(other.switch_to("task-one")), logits(extension.model))
    with pytest.raises(KeyError):
        other.load(folder)


def test_a_fresh_adapter_changes_nothing() -> None:
    for variant in ("lora", "rslora"):
        model = tiny("gpt2", 2)
        before = logits(model)
        extension = LoRAExtension(model, ExtensionConfig(lora_r=4, lora_variant=variant))
        assert torch.equal(logits(extension.create_adapter("task-one")), before)


def test_saving_the_same_extension_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    extension = trained("t5", tmp_path, lora_target_modules=("v", "q", "o", "k"))
    files = []
    for name in ("one", "two"):
        folder = extension.save("task-one", tmp_path / name)
        files.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert files[0] == files[1]
    assert files[0].keys() == {"extension.json", "lora/adapter_config.json", "lora/adapter_model.safetensors"}
    with pytest.raises(FileExistsError):
        extension.save("task-one", tmp_path / "one")


def test_the_manifest_says_what_was_made(tmp_path: Path) -> None:
    extension = trained("gpt2", tmp_path)
    manifest = read_manifest(extension.save("task-one"))
    assert (manifest.kind, manifest.task_name, manifest.operations) == ("lora", "task-one", ({"op": "lora"},))
    assert manifest.parameter_counts == extension.parameter_counts("task-one").as_dict()
    assert manifest.config["lora_r"] == 4


def test_counts_equal_what_would_be_trained() -> None:
    for variant in ("lora", "dora"):
        config = ExtensionConfig(lora_r=4, lora_target_modules=("q", "wi_0"), lora_variant=variant)
        extension = LoRAExtension(tiny("t5", 2), config)
        extension.create_adapter("task-one")
        base = extension.parameter_counts("task-one").base
        assert extension.parameter_counts("task-one") == KINDS["lora"].counts(tiny("t5", 2), config, base)


def damaged(folder: Path, how: str) -> None:
    weights, manifest = folder / "lora" / "adapter_model.safetensors", folder / "extension.json"
    stored = json.loads(manifest.read_text())
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "later format":
            manifest.write_text(json.dumps(stored | {"format": 2}))
        case "unknown operation":
            manifest.write_text(json.dumps(stored | {"operations": [{"op": "exec"}]}))


@pytest.mark.parametrize("how", ["truncated", "no weights", "no manifest", "later format", "unknown operation"])
def test_damaged_files_are_refused_and_the_base_stays(tmp_path: Path, how: str) -> None:
    folder = trained("gpt2", tmp_path).save("task-one")
    model = tiny("gpt2", 2)
    before = logits(model)
    attachable(folder, model)
    damaged(folder, how)
    with pytest.raises(ExtensionRefused):
        attachable(folder, model)
    assert torch.equal(logits(model), before)


def test_an_extension_fits_only_its_own_base(tmp_path: Path) -> None:
    """PEFT loads an adapter for 2 layers onto 1 or 3 without a word."""
    folder = trained("gpt2", tmp_path).save("task-one")
    for layers in (1, 3):
        with pytest.raises(ExtensionRefused, match="other layers"):
            attachable(folder, tiny("gpt2", layers))
    manifest = read_manifest(folder)
    (folder / "extension.json").write_text(
        json.dumps({**{name: getattr(manifest, name) for name in manifest.__slots__}, "base_digest": "aa"})
    )
    attachable(folder, tiny("gpt2", 2), base_digest="aa")
    with pytest.raises(ExtensionRefused, match="made for aa, this base is bb"):
        attachable(folder, tiny("gpt2", 2), base_digest="bb")
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["q", "Task", "a", "my-lora", "default", "base", "x" * 64, "-ab", "a.b", "c_fc"])
def test_names_that_break_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigInvalid) as invalid:
        require_task_name(name, ["transformer.h.0.mlp.c_fc"])
    assert invalid.value.violations[0][0] == "task_name"
    require_task_name("python-3", ["transformer.h.0.mlp.c_fc"])


def test_defaults_are_those_of_spec_004() -> None:
    config = ExtensionConfig()
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)
    assert (config.layer_position, config.layer_initialization_scale, config.freeze_base) == ("encoder", 0.01, True)
    assert replace(config, lora_target_modules=["q", "k"]).lora_target_modules == ("q", "k")


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigInvalid) as invalid:
        ExtensionConfig(
            lora_r=0, lora_alpha=0, lora_dropout=1.0, lora_variant="x", layer_position="top",
            layer_initialization_scale=2, lora_target_modules=("q", "q"),
        )  # fmt: skip
    assert [field for field, _ in invalid.value.violations] == [
        "lora_r", "lora_alpha", "lora_dropout", "lora_variant", "lora_target_modules", "layer_position",
        "layer_initialization_scale",
    ]  # fmt: skip


def test_layers_and_hybrids_preserve_the_base_at_scale_zero_and_survive_saving(tmp_path: Path) -> None:
    for family in ("gpt2", "t5"):
        base = logits(tiny(family, 2))
        config = ExtensionConfig(lora_r=4, layer_initialization_scale=0.0, save_path=tmp_path / family)
        for kind, name in (
            (TransformerLayerExtension, "create_extended_model"),
            (HybridExtension, "create_hybrid_model"),
        ):
            extension = kind(tiny(family, 2), config)
            assert torch.equal(logits(getattr(extension, name)(f"task-{extension.kind}")), base)
            disturb(extension, f"task-{extension.kind}")
            extended = logits(extension.model)
            assert not torch.equal(extended, base)
            folder = extension.save(f"task-{extension.kind}")
            assert torch.equal(logits(extension.switch_to(None)), base)

            other = kind(tiny(family, 2), config)
            assert torch.equal(logits(other.switch_to(other.load(folder))), extended)
            counts = other.parameter_counts(f"task-{extension.kind}")
            assert counts == KINDS[extension.kind].counts(tiny(family, 2), config, counts.base)


def test_a_hybrids_manifest_says_what_peft_cannot(tmp_path: Path) -> None:
    extension = HybridExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, save_path=tmp_path))
    extension.create_hybrid_model("task-one")
    folder = extension.save("task-one")
    assert read_manifest(folder).operations == ({"op": "insert", "position": "decoder", "index": 2}, {"op": "lora"})
    weights = folder / "inserted.safetensors"
    keys = set(load_file(weights))
    assert keys == {f"transformer.h.2.{name}" for name, _ in tiny("gpt2", 2).transformer.h[1].named_parameters()}
    save_file({**load_file(weights), "transformer.h.20.ln_1.weight": torch.zeros(64)}, weights)
    with pytest.raises(ExtensionRefused, match=r"inserted\.safetensors is not the file that was written"):
        attachable(folder, tiny("gpt2", 2))
    stored = json.loads((folder / "extension.json").read_text())
    (folder / "extension.json").write_text(json.dumps(stored | {"inserted_digest": ""}))
    with pytest.raises(ExtensionRefused, match=r"unexpected transformer\.h\.20\.ln_1\.weight"):
        attachable(folder, tiny("gpt2", 2))


def disturb(extension: HybridExtension | TransformerLayerExtension, task_name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = extension.attached[task_name].state()
    extension.attached[task_name].load(
        {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    )
