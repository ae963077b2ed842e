from __future__ import annotations

import asyncio

import pytest

from services.kit.gathering import Gathering


class Work:
    """Doubles numbers, together, when it is let."""

    def __init__(self) -> None:
        self.together: list[list[int]] = []
        self.gate = asyncio.Event()

    async def __call__(self, numbers: list[int]) -> list[int | Exception]:
        self.together.append(numbers)
        await self.gate.wait()
        if 13 in numbers:
            raise ArithmeticError
        return [ValueError(str(number)) if number < 0 else 2 * number for number in numbers]


async def asked(gathering: Gathering[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(gathering.ask(number)) for number in numbers]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_what_is_asked_meanwhile_is_served_together_in_its_order() -> None:
    work = Work()
    gathering: Gathering[int, int] = Gathering(work, most=3)
    tasks = await asked(gathering, 1)
    tasks += await asked(gathering, 2, 3, 4, 5)
    work.gate.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8, 10]
    assert work.together == [[1], [2, 3, 4], [5]]
    assert await gathering.ask(6) == 12


async def test_a_failure_is_of_who_asked_for_it_or_of_all() -> None:
    work = Work()
    gathering: Gathering[int, int] = Gathering(work)
    tasks = await asked(gathering, 1) + await asked(gathering, -2, 3)
    work.gate.set()
    one, two, three = await asyncio.gather(*tasks, return_exceptions=True)
    assert (one, three, str(two)) == (2, 6, "-2")
    tasks = await asked(gathering, 12, 13)
    assert [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)] == [ArithmeticError] * 2
    assert await gathering.ask(1) == 2


async def test_who_stops_waiting_stops_nobody_else() -> None:
    work = Work()
    gathering: Gathering[int, int] = Gathering(work)
    running, waiting, other = await asked(gathering, 1) + await asked(gathering, 2, 3)
    running.cancel()
    waiting.cancel()
    await asyncio.wait([running, waiting])
    work.gate.set()
    assert await other == 6
    assert work.together == [[1], [3]]
    with pytest.raises(asyncio.CancelledError):
        await waiting
