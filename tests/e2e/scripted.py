"""A small mesh of scripted processes under the real supervisor, for `test_supervisor.py`.

`python -m tests.e2e.scripted run STATE CASE` supervises and prints one JSON line per event; the other roles are its
children.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from services.runtime import lifeline
from services.runtime.backoff import RestartPolicy
from services.runtime.errors import StartError
from services.runtime.process import ProcessSpec, become_subreaper
from services.runtime.supervisor import Supervisor

CASES = {
    "family": [("parent", "family"), ("other", "plain")],
    "crashing": [("flaky", "crash-when-told")],
    "stubborn": [("stubborn", "stubborn")],
    "stillborn": [("fine", "plain"), ("stillborn", "stillborn")],
    "never-ready": [("slow", "never-ready")],
}


def say(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def supervise(state: Path, case: str) -> int:
    become_subreaper()
    line = lifeline.Lifeline()
    await line.open()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    supervisor = Supervisor(
        state,
        lambda message: say(report=message),
        lambda: say(pids=supervisor.pids, failed=supervisor.failed),
        ready_seconds=3.0,
        grace_seconds=1.0,
        policy=partial(RestartPolicy, first_seconds=0.01, factor=1.0),
    )
    try:
        async with supervisor:
            await supervisor.start(*(spec(supervisor, state, name, role, line) for name, role in CASES[case]))
            say(ready=supervisor.pids)
            await stopping.wait()
    except StartError as error:
        say(error=str(error))
        return 1
    return 0


def spec(supervisor: Supervisor, state: Path, name: str, role: str, line: lifeline.Lifeline) -> ProcessSpec:
    flag = state / f"{name}.ready"

    async def probe() -> str | None:
        raised = flag.exists() and flag.read_text() == str(supervisor.pids.get(name))
        return None if raised else "its flag"

    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-m", "tests.e2e.scripted", role, str(state), name),
        environment={**os.environ, **line.environment()},
        directory=Path(__file__).parents[2],
        probe=probe,
    )


def play(role: str, state: Path, name: str) -> None:
    """Be one of the processes."""
    if role == "stillborn":
        sys.exit("this one has no port to listen on")
    if role == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if role == "family":
        rank = [sys.executable, "-m", "tests.e2e.scripted", "rank", str(state), "rank"]
        subprocess.Popen(rank, start_new_session=True)  # as torchrun starts its ranks
        while not (state / "rank.ready").exists():
            time.sleep(0.01)
    lifeline.follow(grace_seconds=0.2)
    (state / f"{name}.pid").write_text(str(os.getpid()))
    if role != "never-ready":
        staged = state / f"{name}.staged"
        staged.write_text(str(os.getpid()))
        staged.rename(state / f"{name}.ready")
    while not (role == "crash-when-told" and (state / "crash").exists()):
        time.sleep(0.01)
    sys.exit("told to crash")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(asyncio.run(supervise(Path(sys.argv[2]), sys.argv[3])))
    play(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
