"""Two processes under the launcher train what one trains: the same batches, the gradients added up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from services.extensions.compute import ExtensionConfig, LoRAExtension, Trainer, TrainSettings
from services.extensions.compute.examples import IGNORED, Examples
from services.extensions.compute.team import ALONE, Team
from services.residency.gang import program
from tests.models import batch, tiny


def trained(team: Team) -> dict[str, torch.Tensor]:
    """Weights after a few steps without dropout; rows hold unequal numbers of labels."""
    extension = LoRAExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, lora_dropout=0.0))
    extension.create_adapter("task")
    extension.switch_to(None)
    for module in extension.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = batch(12, 16)
    labels = ids.clone()
    labels[::3, 5:] = IGNORED
    settings = TrainSettings(steps=5, batch_size=4, learning_rate=5e-3, gradient_accumulation_steps=2)
    training = Trainer(extension.model, extension.attached, "task", Examples(ids, labels), settings, team=team)
    while not training.done:
        training.step()
    return extension.attached["task"].state()


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    result = tmp_path / "weights.safetensors"
    command = program("tests.unit.extensions.compute.member", ["cpu", "cpu"])
    subprocess.run(command, env={**os.environ, "TEAM_RESULT": str(result)}, check=True, timeout=100)
    together, alone = load_file(result), trained(ALONE)
    assert together.keys() == alone.keys()
    for key, weight in alone.items():
        torch.testing.assert_close(together[key], weight, rtol=1e-3, atol=1e-5)
    assert any(float(weight.norm()) > 0 for key, weight in together.items() if "lora_B" in key)
