"""Where a model runs, and how many sequences at once, follows from the mode and the memory left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch

from services.extraction import preparing
from services.extraction.adapters.residency import HostModel
from services.extraction.domain import Mode, Options
from services.residency.families import facts

FACTS = facts({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100})


@dataclass
class Leased:
    """A model on a device of which so much memory is left."""

    free_bytes: int
    on_host: bool = False
    copies: int = 0
    facts: Any = FACTS

    async def host_copy(self) -> Leased:
        self.copies += 1
        return Leased(2**40, on_host=True)


def options(mode: Mode) -> Options:
    return Options(
        hook_points=("blocks.1.hook_resid_post",),
        layout="rows",
        dtype="float32",
        batch_size=32,
        max_length=64,
        sample_count=None,
        max_tokens=0,
        extension_id="",
        extension_uri="",
        seed=0,
        mode=mode,
    )


@pytest.mark.parametrize(
    ("mode", "free_bytes", "on_host", "copied"),
    [
        ("auto", 2**30, False, False),
        ("auto", 1000, False, True),
        ("auto", 1000, True, False),
        ("cpu", 2**30, False, True),
        ("cpu", 2**30, True, False),
        ("full", 1000, False, False),
        ("safe", 1000, False, False),
    ],
)
async def test_the_host_takes_what_the_device_cannot(mode: Mode, free_bytes: int, on_host: bool, copied: bool) -> None:
    leased: Any = Leased(free_bytes, on_host)
    chosen, model = await preparing.placed(options(mode), leased)
    assert (leased.copies == 1) == copied
    assert model.on_host == (on_host or copied)
    assert chosen == ("cpu" if copied else mode)


def test_a_mode_says_how_many_sequences_run_at_once() -> None:
    model: Any = Leased(2**23)
    ran = {}
    for mode in get_args(Mode):
        pace = preparing.pace(mode, options(mode), model)
        ran[mode] = [part.stop - part.start for part in pace.parts(32, 64, lambda part: part, "cpu")]
    assert ran["full"] == [32]
    assert ran["safe"] == [1] * 32
    assert 1 < max(ran["auto"]) < 32


async def test_a_copy_on_the_host_computes_what_the_model_does() -> None:
    model = torch.nn.Linear(4, 4)
    leased: Any = type("Leased", (), {"family": None, "tokenizer": None, "facts": FACTS, "description": {}})()
    host = HostModel(leased, model)
    assert (host.on_host, await host.host_copy()) == (True, host)
    x = torch.ones(1, 4)
    assert torch.equal(await host.run(host.model, x), model(x))
