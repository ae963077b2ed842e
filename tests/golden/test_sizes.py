"""Sizes come from the config and never from a name: parameters of published models, counted without their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.residency.estimate import laid_out, parameter_count
from services.residency.families import FAMILIES, facts, family_of_config
from services.residency.loading import config_of, skeleton

GEMMA = {"model_type": "gemma2", "vocab_size": 256000}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": 32, "tie_word_embeddings": False}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),
    "gpt-neo-125m": (
        {"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12,
         "attention_types": [[["global", "local"], 6]], "max_position_embeddings": 2048},
        125_198_592,
    ),
    "llama-2-7b": (
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        6_738_415_616,
    ),
    "llama-3-8b": (
        {**LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_key_value_heads": 8},
        8_030_261_248,
    ),
    "tinyllama-1.1b": (
        {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
        1_100_048_384,
    ),
    "mistral-7b": (
        {**LLAMA, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_key_value_heads": 8},
        7_241_732_096,
    ),
    "mistral-nemo-12b": (
        {**LLAMA, "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336,
         "num_hidden_layers": 40, "num_key_value_heads": 8, "head_dim": 128},
        12_247_782_400,
    ),
    "qwen2.5-14b": (
        {**LLAMA, "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
         "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8},
        14_770_033_664,
    ),
    "gemma-2-2b": (
        {**GEMMA, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256},
        2_614_341_888,
    ),
    "gemma-2-27b": (
        {**GEMMA, "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
         "num_key_value_heads": 16, "head_dim": 128},
        27_227_128_320,
    ),
    "gpt-j-6b": (
        {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
         "n_positions": 2048, "tie_word_embeddings": False},
        6_050_882_784,
    ),
    "bloom-560m": ({"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
                   559_214_592),
    "falcon-7b": (
        {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
         "num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False},
        6_921_720_704,
    ),
}  # fmt: skip
"""Of spec/003's appendix A, one config of each family at least, with the parameters that its publisher counts; and the
sizes that the system behind spec/000 guessed from names (1.1B, 12B, 14B, 27B)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_bytes_follow_from_the_config(name: str) -> None:
    stored, expected = PUBLISHED[name]
    config = config_of(stored)
    model = skeleton(config, torch.bfloat16)
    assert parameter_count(model, []) == expected
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert laid_out(model, [], "bf16", torch.bfloat16, "cpu").weights == 2 * expected + buffers
    known = facts(stored)
    assert sum(known.group_sizes) == known.dict_size == 16 * known.hidden_size


@pytest.mark.parametrize(("model_type", "experimental"), [
    *((name, False) for name in ("gpt2", "gpt_neo", "llama", "mistral", "gemma2")),
    *((name, True) for name in ("falcon", "bloom", "gptj")),
])  # fmt: skip
def test_every_family_of_appendix_a_has_a_layout_and_the_later_ones_are_experimental(
    model_type: str, experimental: bool
) -> None:
    assert model_type in FAMILIES
    stored = next(config for config, _ in PUBLISHED.values() if config["model_type"] == model_type)
    family = family_of_config(stored)
    assert family is not None
    assert family.experimental is experimental
