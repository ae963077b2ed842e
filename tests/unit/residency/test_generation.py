"""Generation a few tokens at a time gives what transformers' own generate gives."""

from __future__ import annotations

import pytest
import torch

from services.residency.families import facts, family_of
from services.residency.generation import TURN, Continuation
from services.residency.lenses import Base
from services.residency.lenses.extension import Extensions
from services.residency.reading import TextRefused, token_ids
from tests import models

PROMPT = models.batch(1, 12)[0].tolist()


def base_of(family: str) -> Base:
    model = models.tiny(family)
    known = None if model.config.is_encoder_decoder else family_of(model)
    return Base(model, known, facts(model.config.to_dict()), "d" * 64, Extensions())


def run(base: Base, **more) -> list[int]:
    work = Continuation(base=base, prompt=PROMPT, **{"max_new_tokens": 20, **more})
    turns = 0
    while not work.done:
        work.turn(base.family)
        turns += 1
    assert turns == -(-len(work.tokens) // TURN)
    return work.tokens


@pytest.mark.parametrize("family", [*models.FAMILIES, "t5"])
def test_greedy_generation_is_transformers_own(family):
    base = base_of(family)
    expected = base.model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=-1,
    )[0]
    assert run(base) == expected[1 if family == "t5" else len(PROMPT) :].tolist()


def test_it_ends_at_an_end_token():
    base = base_of("gpt2")
    tokens = run(base)
    end = tokens[5]
    assert run(base, end_ids=frozenset({end})) == tokens[: tokens.index(end) + 1]


def test_the_same_seed_gives_the_same_text():
    base = base_of("llama")
    one, two, other = (run(base, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert one == two != other


@pytest.mark.parametrize(
    ("text", "ids", "field"),
    [
        ("", [], "text"),
        ("a", [3], "text"),
        ("", [512], "token_ids"),
        ("", [-1], "token_ids"),
        ("", [3] * 129, "token_ids"),
    ],
)
def test_tokens_that_the_model_cannot_take_name_their_field(text, ids, field):
    with pytest.raises(TextRefused) as caught:
        token_ids(text, ids, models.tokenizer(), base_of("gpt2").facts)
    assert caught.value.field == field


def test_a_text_needs_a_tokenizer():
    known = base_of("gpt2").facts
    assert token_ids("", [5, 6], None, known) == [5, 6]
    with pytest.raises(TextRefused, match="no tokenizer"):
        token_ids("a", [], None, known)
