"""The launcher of training processes: real processes that end together, however one of them ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import psutil
import pytest

from services.residency import gang
from tests.support import eventually

HOME = Path(__file__).parents[2]


async def launched() -> tuple[Process, dict[int, psutil.Process]]:
    """A gang of two, and its ranks."""
    launcher = await asyncio.create_subprocess_exec(
        *gang.program("tests.wire.gang_rank", ("cpu", "cpu")), stdin=PIPE, stdout=PIPE, cwd=HOME
    )
    assert launcher.stdout is not None
    said = [(await launcher.stdout.readline()).split() for _ in range(2)]
    assert {line[2] for line in said} == {b"2"}
    return launcher, {int(rank): psutil.Process(int(pid)) for rank, pid, _ in said}


def gone(processes: dict[int, psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes.values())


async def test_ranks_do_not_outlive_their_launcher() -> None:
    launcher, ranks = await launched()
    assert ranks.keys() == {0, 1}
    assert not gone(ranks)
    launcher.kill()
    await launcher.wait()
    await eventually(lambda: gone(ranks))


@pytest.mark.parametrize("killed", [0, 1])
async def test_a_rank_that_is_killed_ends_its_gang_in_the_same_way(killed: int) -> None:
    launcher, ranks = await launched()
    ranks[killed].kill()
    assert await launcher.wait() == -signal.SIGKILL
    assert gone(ranks)


async def test_a_rank_that_fails_ends_its_gang_with_its_status() -> None:
    launcher, ranks = await launched()
    await launcher.communicate(b"3\n")
    assert launcher.returncode == 3
    assert gone(ranks)


def test_one_device_needs_no_launcher() -> None:
    assert gang.program("a.module", ("cpu",)) == (sys.executable, "-m", "a.module")
    assert gang.program("a.module", ("0,1",)) == (sys.executable, "-m", "a.module")
    assert [gang.sight(one)["CUDA_VISIBLE_DEVICES"] for one in ("cpu", "0", "0,1")] == ["", "0", "0,1"]
    assert gang.rank() == 0
    with gang.joined() as store:
        assert store is None
