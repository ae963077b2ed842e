"""Facts and defaults that follow from a config alone; spec/002's table is the reference."""

from __future__ import annotations

import pytest

from services.residency.families import FAMILIES, UnsupportedModel, default_groups, default_top_k, facts

# spec/002: model, activation size, layers, typical dictionary (16x)
TABLE = [
    ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, 768, 12, 12288),
    ("gpt2-medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}, 1024, 24, 16384),
    ("gpt2-large", {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024}, 1280, 36, 20480),
    ("gpt2-xl", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024}, 1600, 48, 25600),
    ("gemma-2-2b", {"hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216}, 2304, 26, 36864),
    ("gemma-2-9b", {"hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14336}, 3584, 42, 57344),
    ("gemma-2-27b", {"hidden_size": 4608, "num_hidden_layers": 46, "intermediate_size": 36864}, 4608, 46, 73728),
]


@pytest.mark.parametrize(("name", "config", "width", "layers", "dictionary"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table_of_spec_002(name, config, width, layers, dictionary):
    gemma = name.startswith("gemma")
    found = facts({"model_type": "gemma2" if gemma else "gpt2", "vocab_size": 50257, **config})
    assert (found.hidden_size, found.num_layers, found.dict_size) == (width, layers, dictionary)
    assert found.group_sizes == (width, 2 * width, 4 * width, 9 * width)
    assert sum(found.group_sizes) == dictionary
    assert found.model_batch_size == (4 if gemma else 32)
    assert found.dtype == ("bfloat16" if gemma else None)


def test_the_groups_and_top_k_that_spec_002_prints():
    assert default_groups(12288, 768) == (768, 1536, 3072, 6912)
    assert default_groups(36864, 2304) == (2304, 4608, 9216, 20736)
    assert (default_top_k(12288), default_top_k(36864)) == (64, 192)


@pytest.mark.parametrize("dictionary", [16, 4096, 5000, 12289])
def test_groups_of_another_dictionary_keep_the_proportions_and_sum_to_it(dictionary):
    groups = default_groups(dictionary, 300)
    assert sum(groups) == dictionary
    assert groups[0] * 2 <= groups[1] + 2
    assert list(groups) == sorted(groups)
    assert default_top_k(dictionary) % 32 == 0
    assert default_top_k(16) == 32


def test_a_config_without_a_width_is_refused_by_what_is_missing():
    with pytest.raises(UnsupportedModel, match="hidden_size"):
        facts({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 10})


def test_the_families_of_spec_003_are_known():
    assert {"gpt2", "gpt_neo", "llama", "mistral", "gemma2"} <= FAMILIES.keys()
