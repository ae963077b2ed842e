"""`lensmesh extensions compare`: spec/004's table to the digit, and every kind trained on the same steps."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from services.cli import app
from services.extensions.compute import ExtensionConfig, TrainSettings
from services.extensions.compute.compare import counted, trained
from services.extensions.compute.examples import from_texts
from services.extensions.compute.loss import held_out_loss
from tests.models import TEXTS, batch, saved, tiny, tokenizer


def test_the_published_table() -> None:
    found = json.loads(CliRunner().invoke(app, ["extensions", "compare", "--json"]).stdout)
    assert found["base"] == 76_961_152
    kinds = found["kinds"]
    assert {name: kind["trainable"] for name, kind in kinds.items()} == {
        "lora": 688_128, "layer": 2_360_320, "hybrid": 3_077_120,
    }  # fmt: skip
    assert [f"{kind['trainable_over_base']:.3%}" for kind in kinds.values()] == ["0.894%", "3.067%", "3.998%"]
    assert (kinds["hybrid"]["lora"], kinds["hybrid"]["layer"]) == (716_800, 2_360_320)
    assert {name: round(ratio, 1) for name, ratio in found["ratios"].items()} == {
        "hybrid_over_lora": 4.5, "hybrid_over_layer": 1.3,
    }  # fmt: skip
    shown = CliRunner().invoke(app, ["extensions", "compare", "--targets", "q,k,v,o"]).stdout
    assert "1,376,256" in shown


def test_a_model_on_the_disk_is_counted_by_its_headers() -> None:
    arguments = ["extensions", "compare", "--json", "--model", str(saved("gpt2", 2)), "--rank", "4"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert found["base"] == sum(parameter.numel() for parameter in tiny("gpt2", 2).parameters())
    refused = CliRunner().invoke(app, [*arguments[:-1], "4000"])
    assert refused.exit_code == 2
    assert "lora.r" in refused.stderr


def test_every_kind_learns_and_leaves_the_base() -> None:
    model, encode = tiny("gpt2", 2), tokenizer()
    before = model(batch()).logits
    rows = from_texts((encode(text)["input_ids"] for text in TEXTS), 16, separator=2)
    config = ExtensionConfig(lora_r=4, layer_initialization_scale=0.0)
    start = held_out_loss(model, rows)
    found = trained(model, (rows, rows), config, TrainSettings(steps=6, batch_size=4, learning_rate=5e-3))
    counts = counted(model, 1000, config)
    for name, learnt in found.items():
        assert learnt.loss_before == start
        assert learnt.loss_after < start
        assert learnt.seconds > 0
        assert learnt.nbytes == 4 * counts[name].trainable
    assert torch.equal(model(batch()).logits, before)
