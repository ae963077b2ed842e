"""The supervisor's promises, kept by real processes: what crashes comes back, and nothing is ever left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from tests.support import eventually


class Run:
    """A supervisor in a process of its own, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, state: Path) -> None:
        self.process = process
        self.state = state

    async def until(self, key: str) -> dict[str, object]:
        """The next event that carries `key`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            while True:
                line = await self.process.stdout.readline()
                assert line, f"the supervisor ended before it said {key!r}"
                event = json.loads(line)
                if key in event:
                    return event

    def pid(self, name: str) -> int:
        return int((self.state / f"{name}.pid").read_text())

    async def ended(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def all_gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for pid in pids)


@pytest.fixture
async def supervised(tmp_path: Path) -> AsyncIterator[Callable[[str], asyncio.Future[Run]]]:
    runs: list[Run] = []

    async def run(case: str) -> Run:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.e2e.scripted", "run", str(tmp_path), case),
            stdout=asyncio.subprocess.PIPE,
        )
        runs.append(Run(process, tmp_path))
        return runs[-1]

    yield run
    for one in runs:
        if one.process.returncode is None:
            one.process.kill()
            await one.process.wait()


async def test_a_crashed_process_comes_back_and_the_others_stay(supervised):
    run = await supervised("family")
    before = (await run.until("ready"))["ready"]
    rank = run.pid("rank")
    psutil.Process(before["parent"]).kill()
    assert "parent was ended by SIGKILL" in (await run.until("report"))["report"]
    assert (await run.until("report"))["report"] == "parent is ready again"
    assert run.pid("parent") != before["parent"]
    assert alive(run.pid("parent"))
    assert run.pid("other") == before["other"]
    assert alive(before["other"])
    await eventually(all_gone([rank]))


async def test_a_stop_leaves_nothing_behind(supervised):
    run = await supervised("family")
    pids = [*(await run.until("ready"))["ready"].values(), run.pid("rank")]
    assert all(alive(pid) for pid in pids)
    run.process.send_signal(signal.SIGTERM)
    assert await run.ended() == 0
    assert not any(alive(pid) for pid in pids)


async def test_a_killed_supervisor_takes_everything_with_it(supervised):
    run = await supervised("family")
    pids = [*(await run.until("ready"))["ready"].values(), run.pid("rank")]
    run.process.kill()
    await run.ended()
    await eventually(all_gone(pids))


async def test_a_process_that_crashes_too_often_is_given_up_and_said(supervised):
    run = await supervised("crashing")
    await run.until("ready")
    (run.state / "crash").touch()
    reports = []
    while "failed" not in (report := (await run.until("report"))["report"]):
        reports.append(report)
    crashes = [one for one in reports if "told to crash" in one]
    assert len(crashes) == 4
    assert all("it is started again in 0.01 s" in one for one in crashes)
    assert report.endswith("it crashed 5 times within minutes and is given up: failed")
    assert (await run.until("failed"))["failed"] == ["flaky"]
    run.process.send_signal(signal.SIGTERM)
    assert await run.ended() == 0


async def test_what_does_not_drain_is_killed_and_said(supervised):
    run = await supervised("stubborn")
    pid = (await run.until("ready"))["ready"]["stubborn"]
    run.process.send_signal(signal.SIGTERM)
    assert (await run.until("report"))["report"] == "stubborn did not drain within 1 s and was killed"
    assert await run.ended() == 0
    assert not alive(pid)


async def test_a_process_that_ends_before_it_is_ready_stops_the_start(supervised):
    run = await supervised("stillborn")
    error = (await run.until("error"))["error"]
    assert error.startswith("stillborn exited with status 1 (this one has no port to listen on)")
    assert await run.ended() == 1
    assert not alive(run.pid("fine"))


async def test_a_process_that_is_not_ready_in_time_stops_the_start(supervised):
    run = await supervised("never-ready")
    assert (await run.until("error"))["error"] == "slow is not ready after 3 s, it waits for: its flag"
    assert await run.ended() == 1
    assert not alive(run.pid("slow"))
