"""The published parameter counts of spec/004, on the meta device: its T5 is never built.

spec/004 names the targets q,k,v,o, but its 688,128 is what q,v give; both readings are held here.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest
from transformers import PreTrainedModel, T5Config

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import checkpoint_parameters, distinct_parameters, skeleton
from services.extensions.compute.lora_extension import lora_counts
from tests.models import saved, tiny

BASE = 76_961_152
TIED = 60_511_616


@pytest.fixture(scope="module")
def t5() -> PreTrainedModel:
    return skeleton(
        T5Config(
            vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip


def checkpoint(path: Path, model: PreTrainedModel, *, head: bytes | None) -> Path:
    """A sparse file with the header of a checkpoint; `head` begins a head of its own, None leaves it out."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if head is not None:
        shapes["lm_head.weight"] = list(model.lm_head.weight.shape)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    file = path / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        if head is not None:
            out.seek(8 + len(encoded) + header["lm_head.weight"]["data_offsets"][0])
            out.write(head)
        out.truncate(8 + len(encoded) + offset)
    return file


def test_the_base_counts_its_head_when_the_file_holds_a_different_one(t5: PreTrainedModel, tmp_path: Path) -> None:
    assert distinct_parameters(t5) == TIED, "transformers ties T5's head whatever the config says"
    assert checkpoint_parameters([checkpoint(tmp_path, t5, head=b"\x01")], t5) == BASE
    assert checkpoint_parameters([checkpoint(tmp_path, t5, head=b"")], t5) == TIED
    assert checkpoint_parameters([checkpoint(tmp_path, t5, head=None)], t5) == TIED


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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5"])
def test_headers_and_memory_agree(family: str) -> None:
    model = tiny(family, 2)
    files = sorted(saved(family, 2).glob("*.safetensors"))
    assert checkpoint_parameters(files, skeleton(model.config.to_dict())) == distinct_parameters(model)


def test_a_file_that_is_no_checkpoint_is_refused(t5: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"x\.safetensors is no safetensors file"):
        checkpoint_parameters([tmp_path / "x.safetensors"], t5)
