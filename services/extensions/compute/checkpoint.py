"""The state of a training on disk: `state.safetensors` and `state.json`, no pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save as save_tensors

from services.extensions.compute.train import Trainer
from services.residency.lenses.extension import ExtensionRefused
from services.residency.lenses.extension_files import read_tensors


def files(trainer: Trainer) -> Callable[[Path], None]:
    """Copy the trainer's state now; the result writes it into an empty folder later, on any thread."""
    tensors, facts = trainer.state()

    def write(folder: Path) -> None:
        (folder / "state.safetensors").write_bytes(save_tensors(tensors))
        (folder / "state.json").write_text(json.dumps(facts, sort_keys=True))

    return write


def load(trainer: Trainer, folder: Path) -> None:
    """Continue from what `files` wrote, bit for bit.

    Raises:
        ExtensionRefused: the files are damaged, or belong to another training.
    """
    try:
        facts = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ExtensionRefused("checkpoint", "state.json is missing or damaged") from error
    trainer.restore(read_tensors(folder / "state.safetensors"), facts)
