"""The published parameter counts of spec/004, on the meta device: its T5 is never built.

spec/004 names the targets q,k,v,o, but its 688,128 is what q,v give; both readings are held here.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, T5Config

from services.extensions.compute.config import ExtensionConfig, LayerPlacement
from services.extensions.compute.count import ParameterCounts, distinct_parameters, skeleton_of
from services.extensions.compute.kinds import KINDS
from services.residency.checkpoint import Entry, read_header
from services.residency.estimate import parameter_count
from services.residency.lenses.extension_files import structure
from services.residency.loading import skeleton
from tests.models import tiny

BASE = 76_961_152
TIED = 60_511_616


@pytest.fixture(scope="module")
def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return skeleton(config, torch.float32)


def headers(model: PreTrainedModel, folder: Path, *, head: bool) -> list[Entry]:
    """The header of a checkpoint, in a sparse file, with or without a head of its own."""
    tied = set(model.all_tied_weights_keys) - ({"lm_head.weight"} if head else set())
    shapes = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tied
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    file = folder / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        out.truncate(8 + len(encoded) + offset)
    return read_header(file)


def test_the_base_counts_a_head_that_the_file_holds(t5: PreTrainedModel, tmp_path: Path) -> None:
    assert parameter_count(t5, []) == TIED, "transformers ties T5's head whatever the config says"
    assert parameter_count(t5, headers(t5, tmp_path, head=True)) == BASE
    assert parameter_count(t5, headers(t5, tmp_path, head=False)) == TIED


@pytest.mark.parametrize(
    ("targets", "variant", "expected"),
    [
        (("q", "v"), "lora", 688_128),
        ((), "lora", 688_128),
        (("q", "v"), "rslora", 688_128),
        (("q", "v"), "dora", 706_560),
        (("q", "k", "v", "o"), "lora", 1_376_256),
        (("q", "k", "v", "o"), "dora", 1_416_192),
        (("q", "v"), "adalora", 688_896),
        (("q", "k", "v", "o"), "adalora", 1_377_792),
    ],
)
def test_lora_of_rank_16(t5: PreTrainedModel, targets: tuple[str, ...], variant: str, expected: int) -> None:
    config = ExtensionConfig(lora_target_modules=targets, lora_variant=variant)
    assert KINDS["lora"].counts(t5, config, BASE).lora == expected


@pytest.mark.parametrize(
    ("kind", "targets", "lora", "layer"),
    [
        ("layer", ("q", "v"), 0, 2_360_320),
        ("hybrid", ("q", "v"), 716_800, 2_360_320),
        ("hybrid", ("q", "k", "v", "o"), 1_433_600, 2_360_320),
    ],
)
def test_an_inserted_encoder_layer(
    t5: PreTrainedModel, kind: str, targets: tuple[str, ...], lora: int, layer: int
) -> None:
    """A copy of the first block, which owns the relative position bias, counts no more than any other."""
    for index in (None, 1):
        counts = KINDS[kind].counts(t5, ExtensionConfig(lora_target_modules=targets, layer_index=index), BASE)
        assert (counts.lora, counts.layer, counts.trainable) == (lora, layer, lora + layer)


def test_an_inserted_decoder_layer(t5: PreTrainedModel) -> None:
    config = ExtensionConfig(lora_target_modules=("q", "v"), layer_position="decoder")
    counts = KINDS["hybrid"].counts(t5, config, BASE)
    assert (counts.layer, counts.lora - 688_128) == (3_147_264, 57_344)
    both = KINDS["layer"].counts(t5, ExtensionConfig(layer_position="both"), BASE)
    assert both.layer == 2_360_320 + 3_147_264


def counts_of(model: PreTrainedModel, *layers: LayerPlacement, **config: object) -> ParameterCounts:
    return KINDS["hybrid"].counts(model, ExtensionConfig(lora_target_modules=("q", "v"), layers=layers, **config), BASE)


def test_several_and_narrow_layers(t5: PreTrainedModel) -> None:
    """A layer is 786,432 of each attention, 1,536 a neuron and 512 a norm; rank 16 on q, v is 28,672 an attention."""
    whole, later = LayerPlacement(), LayerPlacement(position="decoder", index=4, from_step=100)
    several = counts_of(t5, LayerPlacement(index=2), whole, later)
    assert (several.layer, several.lora) == (2 * 2_360_320 + 3_147_264, 688_128 + 2 * 28_672)
    at_once = counts_of(t5, LayerPlacement(index=2), whole, LayerPlacement(position="decoder", index=4))
    assert (at_once.layer, at_once.lora) == (several.layer, 688_128 + 4 * 28_672)
    narrow = counts_of(t5, LayerPlacement(mlp_width=256))
    assert (narrow.layer, narrow.lora) == (786_432 + 256 * 1_536 + 2 * 512, 716_800)
    both = counts_of(t5, LayerPlacement(position="both", mlp_width=1))
    assert both.layer == (786_432 + 1_536 + 2 * 512) + (2 * 786_432 + 1_536 + 3 * 512)
    assert counts_of(t5, whole, lora_variant="adalora").lora == 716_800 + 50 * 16


def test_a_shared_layer_is_counted_and_not_trained(t5: PreTrainedModel) -> None:
    config = ExtensionConfig(lora_target_modules=("q", "v"), shared_layer_of="x_1")
    insertion = ({"op": "insert", "position": "encoder", "index": 8},)
    counts = KINDS["hybrid"].counts(t5, config, BASE, insertion)
    assert (counts.lora, counts.layer, counts.shared, counts.trainable) == (716_800, 2_360_320, 2_360_320, 716_800)
    assert (counts.trainable_over_base, counts.trainable_over_total) == (716_800 / BASE, 716_800 / 80_038_272)
    trained = KINDS["hybrid"].counts(t5, replace(config, train_shared_layer=True), BASE, insertion)
    assert (trained.shared, trained.trainable) == (0, 3_077_120)


def test_a_copy_that_becomes_a_model_is_trained_whole(t5: PreTrainedModel) -> None:
    counts = KINDS["hybrid"].counts(t5, ExtensionConfig(freeze_base=False), BASE)
    assert (counts.trainable, counts.trainable_over_total) == (80_038_272, 1.0)


def test_the_published_comparison(t5: PreTrainedModel) -> None:
    shares = {kind: KINDS[kind].counts(t5, ExtensionConfig(), BASE) for kind in ("lora", "layer", "hybrid")}
    assert [f"{c.trainable:,} {c.trainable_over_base:.3%}" for c in shares.values()] == [
        "688,128 0.894%", "2,360,320 3.067%", "3,077,120 3.998%",
    ]  # fmt: skip


def test_both_denominators(t5: PreTrainedModel) -> None:
    counts = KINDS["lora"].counts(t5, ExtensionConfig(), BASE)
    assert counts.as_dict() == {
        "base": BASE, "trainable": 688_128, "lora": 688_128, "layer": 0, "shared": 0,
        "trainable_over_base": 688_128 / BASE, "trainable_over_total": 688_128 / 77_649_280,
    }  # fmt: skip
    assert (f"{counts.trainable_over_base:.4%}", f"{counts.trainable_over_total:.4%}") == ("0.8941%", "0.8862%")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "mistral", "gemma2", "t5"])
def test_a_config_that_came_as_floats_gives_the_same_shapes(family: str) -> None:
    model = tiny(family, 2)
    floats = json.loads(model.config.to_json_string(use_diff=False), parse_int=float)
    again = skeleton_of(floats)
    assert parameter_count(again, []) == distinct_parameters(model)
    assert structure(again) == structure(model)
