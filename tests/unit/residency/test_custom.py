"""Custom models: of classes that the operator names, and of no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.kit import errors
from services.residency import custom, sources
from services.residency.families import family_of
from services.residency.loading import load_model
from tests import models
from tests.custom_model import TwinConfig, TwinLM


def test_a_class_that_the_operator_names_is_loaded_and_no_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = TwinLM(TwinConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    made.save_pretrained(tmp_path / "twin")
    source = sources.Source("custom", "twin")
    config = sources.inspect(source, [tmp_path], tmp_path).config
    with pytest.raises(errors.Unsupported, match="LENSMESH_CUSTOM_CLASSES") as refused:
        custom.check(config, frozenset())
    assert refused.value.metadata["class"] == "TwinLM"
    assert custom.allow(["tests.custom_model:TwinLM"]) == {"TwinLM"}
    custom.check(config, frozenset({"TwinLM"}))
    loaded = load_model(sources.fetch(source, [tmp_path], tmp_path), "none")
    assert type(loaded) is TwinLM
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert family_of(loaded).experimental
    custom.allow(["tests.custom_model:TwinLM"])  # a process may compose residency twice, in tests


@pytest.mark.parametrize(
    "name",
    ["tests.custom_model:Missing", "no.such.module:Class", "TwinLM", "tests.custom_model:NoModel",
     "transformers:GPT2LMHeadModel"],
)  # fmt: skip
def test_what_is_no_model_class_of_its_own_ends_the_start(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic and transformers word it differently
        custom.allow([name])


def test_an_ordinary_model_is_not_custom_by_lying_in_the_root() -> None:
    config = sources.inspect(sources.Source("custom", models.saved("gpt2").name), [models.saved("gpt2").parent], Path())
    with pytest.raises(errors.Unsupported):
        custom.check(config.config, frozenset({"TwinLM"}))
