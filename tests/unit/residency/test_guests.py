"""Lenses that calls bring along stay exactly as long as some call uses them."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from services.kit import errors
from services.residency.guests import Guests
from services.residency.lenses import Spec
from services.residency.pool import Pool
from tests import models

SPEC = Spec("l", "logit_lens")


@pytest.fixture
async def pool():
    made = Pool("cpu", 1 << 30)
    await made.load("m", models.saved("gpt2", 1), "none")
    yield made
    await made.close()


async def attach(pool: Pool, calls: list[str]) -> None:
    calls.append("attach")
    await pool.attach("m", SPEC)


async def test_the_first_call_brings_it_and_the_last_takes_it_away(pool):
    guests, calls, inside, leave = Guests(pool), [], asyncio.Semaphore(0), [asyncio.Event() for _ in range(3)]

    async def call(number: int) -> None:
        async with guests.staying("m", "l", partial(attach, pool, calls)), pool.lease("m"):
            inside.release()
            await leave[number].wait()
            assert "l" in pool.get("m").lenses

    tasks = [asyncio.create_task(call(number)) for number in range(3)]
    for _ in tasks:
        await inside.acquire()
    for number in (0, 2):
        leave[number].set()
        await tasks[number]
        assert "l" in pool.get("m").lenses
    leave[1].set()
    await tasks[1]
    assert pool.get("m").lenses == {}


async def test_calls_that_come_while_it_goes_have_it(pool):
    guests = Guests(pool)

    async def call() -> None:
        for _ in range(5):
            async with guests.staying("m", "l", partial(attach, pool, [])), pool.lease("m"):
                assert "l" in pool.get("m").lenses
                await asyncio.sleep(0)

    await asyncio.gather(*(call() for _ in range(4)))
    assert pool.get("m").lenses == {}


async def test_what_is_attached_for_good_stays(pool):
    guests, calls = Guests(pool), []
    await pool.attach("m", SPEC)
    async with guests.staying("m", "l", partial(attach, pool, calls)):
        pass
    assert calls == []
    await pool.detach("m", "l")
    async with guests.staying("m", "l", partial(attach, pool, calls)):
        guests.keep("m", "l")
    assert calls == ["attach"]
    assert "l" in pool.get("m").lenses


async def test_a_call_that_cannot_bring_it_leaves_nothing_behind(pool):
    guests = Guests(pool)
    wrong = Spec("l", "logit_lens", base_digest="f" * 64)
    with pytest.raises(errors.Conflict):
        async with guests.staying("m", "l", partial(pool.attach, "m", wrong)):
            pass
    assert pool.get("m").lenses == {}
    async with guests.staying("m", "l", partial(attach, pool, [])):
        assert "l" in pool.get("m").lenses
    assert pool.get("m").lenses == {}
