"""What int8 and int4 cost the demo model: perplexity on held-out files of the standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from torch import Tensor

from services.demo.corpus import is_held_out
from services.residency import quantize
from services.residency.kernels import BITSANDBYTES, TORCH
from services.residency.loading import load_model, load_tokenizer
from services.residency.perplexity import batch_loss, perplexity

DEMO = Path(__file__).parents[2] / "deploy/demo/tiny-gpt2"
ROWS, LENGTH = 48, 128


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.glob("*.py")) if is_held_out(file.name)]
    ids = load_tokenizer(DEMO)("\n".join(file.read_text() for file in files), return_tensors="pt").input_ids[0]
    rows = ids[: ROWS * LENGTH].view(ROWS, LENGTH)
    return rows.split(8)


def measured(quantization: str, held_out: tuple[Tensor, ...]) -> float:
    model = load_model(DEMO, quantization)
    return perplexity(batch_loss(model, rows, rows.new_ones(rows.shape)) for rows in held_out).perplexity


@pytest.mark.parametrize("kernel", [BITSANDBYTES, TORCH])
def test_int8_costs_at_most_one_per_cent_and_int4_at_most_five(
    held_out: tuple[Tensor, ...], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "kernel_of", lambda quantization, device: kernel)
    unquantized = measured("none", held_out)
    over = {name: measured(name, held_out) / unquantized - 1 for name in ("int8", "int4")}
    assert 0 < abs(over["int8"]) <= 0.01
    assert 0 < abs(over["int4"]) <= 0.05
