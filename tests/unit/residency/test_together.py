"""Prompts continued together give what each gives alone."""

from __future__ import annotations

import pytest
import torch

from services.residency.families import facts, family_of
from services.residency.generation import Continuation
from services.residency.lenses import Base
from services.residency.lenses.extension import ExtensionRefused, Extensions
from services.residency.lenses.inserted import insert
from services.residency.loading import load_model
from services.residency.together import Together
from tests import models
from tests.unit.residency.lenses.test_mixed import adapter

TARGETS = {"gpt2": "c_attn", "t5": "q"}


def base_of(family: str) -> Base:
    model = load_model(models.saved("llama", 2), family) if "int" in family else models.tiny(family, 2)
    known = None if model.config.is_encoder_decoder else family_of(model)
    base = Base(model, known, facts(model.config.to_dict()), "d" * 64, Extensions())
    target = TARGETS.get(model.config.model_type, "q_proj")
    for seed, key in enumerate(("a", "b"), start=1):
        base.extensions.attach(key, adapter(model, [target], seed, 4))
    return base


def works(base: Base, lengths: list[int]) -> list[Continuation]:
    """Of unlike prompts, ends, temperatures and seeds."""
    return [
        Continuation(
            base, models.batch(1, length, seed=row)[0].tolist(), max_new_tokens=5 + 4 * row,
            temperature=float(row % 2), seed=row,
        )
        for row, length in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [3, 17, 8, 40]])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "t5", "int8", "int4"])
def test_each_is_continued_as_alone(family: str, lengths: list[int]) -> None:
    base, keys = base_of(family), ["a", None, "b", "a"]
    alone = works(base, lengths)
    for work, key in zip(alone, keys, strict=True):
        with base.extensions.using(key):
            while not work.done:
                work.turn(base.family)
    together = Together(base, works(base, lengths), keys)
    turns = 0
    while not together.done:
        assert base.extensions.active is None
        together.turn(4)
        turns += 1
    assert turns == -(-17 // 4)
    assert [work.tokens for work in together.works] == [work.tokens for work in alone]
    assert [len(work.tokens) for work in alone] == [5, 9, 13, 17]


def test_the_adapters_matter_and_an_end_token_ends_one_row_alone() -> None:
    base = base_of("gpt2")
    prompt = models.batch(1, 6)[0].tolist()
    keys = [None, "a", "b"]
    free = Together(base, [Continuation(base, prompt, max_new_tokens=12) for _ in keys], keys)
    free.turn()
    bare, first, second = (work.tokens for work in free.works)
    assert bare != first != second != bare
    end = frozenset({first[3]})
    rows = [Continuation(base, prompt, max_new_tokens=12, end_ids=end if key == "a" else frozenset()) for key in keys]
    ended = Together(base, rows, keys)
    ended.turn()
    assert ended.done
    assert [work.tokens for work in rows] == [bare, first[: first.index(first[3]) + 1], second]


def test_what_is_more_than_lora_is_refused() -> None:
    base = base_of("gpt2")
    base.extensions.attach("layer", insert(base.model, "decoder"))
    prompt = torch.arange(3, 9).tolist()
    with pytest.raises(ExtensionRefused, match="layer"):
        Together(base, [Continuation(base, prompt, 3), Continuation(base, prompt, 3)], ["a", "layer"]).turn()
