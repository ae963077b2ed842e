"""PEFT adapters in and out: strictly in, and out so that plain PEFT computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ConfigInvalid, ExtensionConfig
from services.extensions.compute.count import distinct_parameters
from services.extensions.compute.exchange import export, import_adapter
from services.residency.lenses.extension import ExtensionRefused, applied
from services.residency.lenses.extension_files import attachable, read_manifest
from tests.models import batch, tiny


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        targets = {"decoder_input_ids": batch(seed=1)} if model.config.is_encoder_decoder else {}
        return model(input_ids=batch(), **targets).logits


def peft_folder(folder: Path, family: str = "gpt2", **config: object) -> torch.Tensor:
    """What plain PEFT saves, with random weights; its logits."""
    targets = {"gpt2": ["c_attn", "c_fc"], "t5": ["q", "v"], "llama": ["q_proj"]}[family]
    chosen = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": targets, **config})
    model = get_peft_model(tiny(family, 2), chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    return logits(model.eval())


def imported(folder: Path, target: Path, model: PreTrainedModel) -> Path:
    base = distinct_parameters(model)
    _, counts, write = import_adapter(folder, model, "task-one", base_parameters=base, base_digest="aa")
    target.mkdir()
    write(target)
    assert read_manifest(target).parameter_counts == counts.as_dict()
    return target


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": r".*\.1\..*\.(c_attn|q|q_proj)"}]
)
def test_an_imported_adapter_computes_what_plain_peft_does(family: str, config: dict, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path / "peft", family, **config)
    model = tiny(family, 2)
    before = logits(model)
    ours = imported(tmp_path / "peft", tmp_path / "ours", model)
    extension = attachable(ours, model)
    with applied(extension.edits):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    manifest = read_manifest(ours)
    assert (manifest.kind, manifest.task_name, manifest.base_digest) == ("lora", "task-one", "aa")
    assert manifest.parameter_counts["lora"] == sum(p.numel() for p in extension.parameters.values())
    assert ExtensionConfig.from_dict(manifest.config).lora_alpha == 16


def damage(folder: Path, how: str) -> None:
    weights, described = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    stored, tensors = json.loads(described.read_text()), load_file(weights)
    key = sorted(tensors)[0]
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "no weights":
            weights.unlink()
        case "pickled":
            weights.rename(folder / "adapter_model.bin")
        case "no config":
            described.unlink()
        case "missing key":
            save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
        case "extra key":
            save_file(tensors | {key.replace("h.0", "h.7"): tensors[key].clone()}, weights)
        case "another shape":
            save_file(tensors | {key: tensors[key][:, :-1].contiguous()}, weights)
        case "modules_to_save":
            described.write_text(json.dumps(stored | {"modules_to_save": ["lm_head"]}))
        case "unknown target":
            described.write_text(json.dumps(stored | {"target_modules": ["query"]}))
        case "no rank":
            described.write_text(json.dumps(stored | {"r": 0}))
        case "another method":
            described.write_text(json.dumps(stored | {"peft_type": "IA3"}))


DAMAGES = {
    "truncated": "weights", "no weights": "weights", "pickled": "weights", "no config": "adapter_config",
    "missing key": "weights", "extra key": "weights", "another shape": "weights",
    "modules_to_save": "adapter_config.modules_to_save", "unknown target": "lora.target_modules",
    "no rank": "adapter_config", "another method": "adapter_config.peft_type",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_what_cannot_be_imported_exactly_is_refused_by_name(how: str, tmp_path: Path) -> None:
    peft_folder(tmp_path / "peft")
    damage(tmp_path / "peft", how)
    model = tiny("gpt2", 2)
    before = logits(model)
    with pytest.raises(ExtensionRefused) as refused:
        import_adapter(tmp_path / "peft", model, "task-one", base_parameters=1)
    assert refused.value.field.startswith(DAMAGES[how])
    assert str(tmp_path) not in str(refused.value)
    assert torch.equal(logits(model), before)


def test_an_adapter_of_a_deeper_model_or_an_unusable_name_is_refused(tmp_path: Path) -> None:
    peft_folder(tmp_path / "peft")
    with pytest.raises(ExtensionRefused, match=r"unexpected .*h\.1"):
        import_adapter(tmp_path / "peft", tiny("gpt2", 1), "task-one", base_parameters=1)
    with pytest.raises(ConfigInvalid):
        import_adapter(tmp_path / "peft", tiny("gpt2", 2), "c_attn", base_parameters=1)


def made(folder: Path, kind: str) -> Path:
    folder.mkdir()
    config = ExtensionConfig(lora_r=4)
    Blueprint(kind=kind, task_name="task-one", config=config, base_parameters=1).prepare(tiny("gpt2", 2))(folder)
    return folder


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_plain_peft_loads_an_export_and_we_import_it_again(suffix: str, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path / "peft")
    ours = imported(tmp_path / "peft", tmp_path / "ours", tiny("gpt2", 2))
    out = export(ours, tmp_path / f"out{suffix}", base_model="org/base")
    if suffix:
        again = export(ours, tmp_path / "again.zip", base_model="org/base")
        assert out.read_bytes() == again.read_bytes()
        with ZipFile(out) as archive:
            archive.extractall(tmp_path / "unpacked")
        out = tmp_path / "unpacked"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("gpt2", 2), out).eval()), expected)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    back = imported(out, tmp_path / "back", tiny("gpt2", 2))
    weights = "lora/adapter_model.safetensors"
    assert (back / weights).read_bytes() == (ours / weights).read_bytes()
    with pytest.raises(FileExistsError):
        export(ours, tmp_path / f"out{suffix}")


def test_layers_are_exported_beside_the_adapter_that_fits_them(tmp_path: Path) -> None:
    folder = export(made(tmp_path / "hybrid", "hybrid"), tmp_path / "out")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "extension.json", "inserted.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors",
    ]  # fmt: skip
    model = tiny("gpt2", 2)
    extension = attachable(folder, model)
    with applied([edit for edit in extension.edits if not hasattr(edit.value, "lora_A")]):
        plain = PeftModel.from_pretrained(model, folder / "lora")
        assert len([name for name, _ in plain.named_parameters() if "lora_A" in name]) == 3
    layer = export(made(tmp_path / "layer", "layer"), tmp_path / "layer-out")
    assert {path.name for path in layer.iterdir()} == {"extension.json", "inserted.safetensors"}
