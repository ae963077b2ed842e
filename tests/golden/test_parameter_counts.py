"""The published parameter counts of spec/004, on the meta device: its T5 is never built.

spec/004 names the targets q,k,v,o, but its 688,128 is what q,v give; both readings are held here.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, T5Config

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import distinct_parameters, skeleton_of
from services.extensions.compute.lora_extension import lora_counts
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
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters() if name not in tied}
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
    ],
)
def test_lora_of_rank_16(t5: PreTrainedModel, targets: tuple[str, ...], variant: str, expected: int) -> None:
    config = ExtensionConfig(lora_target_modules=targets, lora_variant=variant)
    assert lora_counts(t5, config, BASE).lora == expected


def test_both_denominators(t5: PreTrainedModel) -> None:
    counts = lora_counts(t5, ExtensionConfig(), BASE)
    assert counts.as_dict() == {
        "base": BASE, "trainable": 688_128, "lora": 688_128, "layer": 0,
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
