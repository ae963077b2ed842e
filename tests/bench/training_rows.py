"""Rows for training benchmarks: what the demo model's layer 2 reads and adds, on the Python standard library's text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from services.demo.corpus import write_corpus
from services.extraction.compute import capture

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
SOURCE, TARGET = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
HELD_OUT = 65_536
CONTEXT = 256


def prepared(folder: Path, rows: int) -> Path:
    """`rows-<rows>.safetensors` in the folder, written unless it is there: x, y [rows, 256], held_x, held_y."""
    path = folder / f"rows-{rows}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as root:
            corpus = write_corpus(Path(root))
            tensors = {}
            for prefix, name, count in (("", corpus.train, rows), ("held_", corpus.held_out, HELD_OUT)):
                x, y = _captured(Path(root) / name, count)
                order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
                tensors |= {f"{prefix}x": x[order], f"{prefix}y": y[order]}
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return path


def mapped(path: Path) -> tuple[Tensor, Tensor]:
    """x and y of a file, mapped."""
    with safe_open(path, "pt") as found:
        return found.get_tensor("x"), found.get_tensor("y")


def _captured(text: Path, count: int) -> tuple[Tensor, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    x, y, position = torch.empty(count, 256), torch.empty(count, 256), 0
    for found in capture(model, _batches(text), [SOURCE, TARGET]):
        part = found[SOURCE][: count - position]
        x[position : position + len(part)] = part
        y[position : position + len(part)] = found[TARGET][: len(part)]
        position += len(part)
        if position == count:
            return x, y
    raise ValueError(f"the text has {position} tokens, {count} were asked for")


def _batches(text: Path, size: int = 32) -> Iterator[Tensor]:
    """Whole contexts of token ids [size, 256], documents end to end."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    pending: list[int] = []
    for line in text.read_text(encoding="utf-8").splitlines():
        pending += tokenizer(json.loads(line)["text"])["input_ids"]
        while len(pending) >= size * CONTEXT:
            yield torch.tensor(pending[: size * CONTEXT]).view(size, CONTEXT)
            del pending[: size * CONTEXT]
