"""A checkpoint's folder: `state.safetensors` and `state.json`; no pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from services.training.compute.trainer import State

FORMAT = 1
TENSORS, FACTS = "state.safetensors", "state.json"


def write(folder: Path, state: State, extra: dict[str, Any]) -> None:
    """Write a trainer's state, and plain JSON that belongs to it, into an empty folder."""
    tensors, facts = state
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    text = json.dumps({"format": FORMAT, "state": facts, "extra": extra}, sort_keys=True)
    (folder / FACTS).write_text(text, encoding="utf-8")


def read(folder: Path) -> tuple[State, dict[str, Any]]:
    """What `write` wrote.

    Raises:
        ValueError: a file is missing, cut short or of another format; the message names the file.
    """
    try:
        stored = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"{FACTS}: format {stored['format']!r}, expected {FORMAT}")
        facts, extra = stored["state"], stored["extra"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FACTS}: cannot be read") from error
    try:
        return (load_file(folder / TENSORS), facts), extra
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{TENSORS}: cannot be read") from error
