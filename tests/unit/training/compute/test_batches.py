"""Rows from a live stream, and the next batch made while one is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.training.compute import CoderPlan, ConfigError, InMemory, Stream, TrainConfig, Trainer
from services.training.compute.batches import Pairs, ahead


def numbered(sizes: list[int]) -> Iterator[Pairs]:
    """Chunks whose rows are told apart by their number; x and y of a row carry the same one."""
    first = 0
    for size in sizes:
        x = torch.arange(first, first + size, dtype=torch.float32)[:, None]
        yield {"a": (x.expand(-1, 3), -x.expand(-1, 2)), "b": (x, x)}
        first += size


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**40)
)
@settings(deadline=None, max_examples=60)
def test_a_pass_gives_every_row_once_and_starts_anywhere(sizes: list[int], batch: int, held: int, seed: int) -> None:
    total = sum(sizes)
    stream = Stream(lambda: numbered(sizes), total, buffer_rows=held)
    assert stream.widths == {"a": (3, 2), "b": (1, 1)}
    whole = list(islice(stream.batches(batch, seed, 0), 2 * total))
    rows = torch.cat([found["b"][0][:, 0] for found in whole])
    for found in whole:
        assert len(found["a"][0]) == batch
        assert torch.equal(found["a"][0][:, 0], found["b"][1][:, 0])
        assert torch.equal(found["a"][1][:, 1], -found["b"][0][:, 0])
    for first in range(0, total * batch, total):
        assert sorted(rows[first : first + total].tolist()) == list(range(total))
    start = (total // batch) * batch
    again = next(stream.batches(batch, seed, start))
    assert torch.equal(again["b"][0], whole[start // batch]["b"][0])


def test_rows_are_mixed_within_the_buffer_and_in_another_order_each_pass() -> None:
    stream = Stream(lambda: numbered([50] * 20), 1000, buffer_rows=400)
    rows = torch.cat([found["b"][0][:, 0] for found in islice(stream.batches(100, 0, 0), 20)]).long()
    first, second = rows[:1000], rows[1000:]
    assert not torch.equal(first, second)
    assert (first.diff() == 1).float().mean() < 0.05
    position = torch.arange(1000)
    assert (first - position).max() < 400  # nothing can come before it was read
    assert (first[:200] >= 200).any()


def test_a_stream_that_ends_early_or_is_empty_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        list(islice(Stream(lambda: numbered([4, 4]), 10).batches(2, 0, 0), 6))
    assert caught.value.field == "rows"
    with pytest.raises(ConfigError) as caught:
        Stream(lambda: iter(()), 10)
    assert caught.value.field == "chunks"


def test_a_live_stream_trains_a_coder() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator).relu()
    chunks = [{"pair": (part, part[:, :4] * 2)} for part in x.split(50)]
    plan = {"a": CoderPlan("pair", TrainConfig(dict_size=32, top_k=4, batch_size=64, num_tokens=64 * 100))}
    reports = [step[0] for step in Trainer(Stream(lambda: iter(chunks), 512, 128), plan).run()]
    assert reports[-1].fvu < 0.3 < reports[0].fvu


class Watched(InMemory):
    """Says when it is asked for its batches."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(pairs)
        self.asked = [threading.Event() for _ in range(4)]

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        for event, found in zip(self.asked, super().batches(batch_size, seed, start), strict=False):
            event.set()
            yield found


def test_the_next_batch_is_made_while_one_is_used() -> None:
    x = torch.zeros(64, 2)
    source = Watched({"a": (x, x)})
    batches = ahead(source.batches(16, 0, 0))
    next(batches)
    assert source.asked[1].wait(30)
    assert not source.asked[2].is_set()
    batches.close()


def test_what_goes_wrong_in_the_source_reaches_the_step() -> None:
    def failing() -> Iterator[Pairs]:
        yield {"a": (torch.zeros(1, 1), torch.zeros(1, 1))}
        raise OSError("gone")

    batches = ahead(failing())
    next(batches)
    with pytest.raises(OSError, match="gone"):
        next(batches)
