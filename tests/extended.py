"""What an extension's folder computes, without any service: by our modules, and by transformers and peft alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from services.extensions.compute import ExtensionConfig, Trainer, TrainSettings
from services.extensions.compute.examples import Examples
from services.residency.lenses.extension import Extensions
from services.residency.lenses.extension_files import attachable, read_manifest

IDS = torch.arange(3, 27).reshape(2, 12)


def t5_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, decoder_input_ids=IDS, use_cache=False).logits


def ours(model: Any, folder: Path) -> torch.Tensor:
    """Logits of a bare base with the extension in a folder."""
    attached = Extensions()
    attached.attach("task", attachable(folder, model))
    with attached.using("task"):
        return t5_logits(model)


def by_peft(directory: Path, folder: Path) -> torch.Tensor:
    """Logits of a hybrid by others' code: a T5 with one encoder layer more, and peft's adapter on it."""
    config = T5Config.from_pretrained(directory)
    (operation,) = [op for op in read_manifest(folder).operations if op["op"] == "insert"]
    assert (operation["position"], operation["index"]) == ("encoder", config.num_layers)
    config.num_layers += 1
    model = T5ForConditionalGeneration(config).eval()
    weights = load_file(directory / "model.safetensors") | load_file(folder / "inserted.safetensors")
    if "lm_head.weight" in weights:
        model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"].clone())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    return t5_logits(PeftModel.from_pretrained(model, folder / "lora").eval())


def trained_numbers(model: Any, folder: Path) -> int:
    """Parameters of the live modules that require a gradient while a step of training is under way."""
    attached = Extensions()
    attached.attach("task", attachable(folder, model))
    config = ExtensionConfig.from_dict(read_manifest(folder).config)
    examples = Examples(IDS, IDS, torch.ones_like(IDS))
    trainer = Trainer(model, attached, "task", examples, TrainSettings(steps=1, batch_size=2), config=config)
    counts: list[int] = []

    def look(module: Any, *_: Any) -> None:
        counts.append(sum(p.numel() for p in module.parameters() if p.requires_grad))

    hook = model.register_forward_pre_hook(look)
    trainer.step()
    hook.remove()
    return counts[0]
