"""The training process itself: it dies with its parent, and how it ended is told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.kit import errors
from services.residency import gang
from services.residency.spoken import HOME
from services.training import dialogue
from services.training.adapters.processes import MODULE, ChildProcess, Processes
from services.training.dialogue import Finished, Progress, Start
from tests.support import eventually

NOTHING = Start({"coders": [], "num_tokens": 0, "base_digest": ""}, "cpu", state="/nowhere")
PARENT = """
import asyncio, sys
from services.training import dialogue
from services.training.adapters.processes import Processes
from services.training.dialogue import Start

async def main():
    plan = {"coders": [], "num_tokens": 0, "base_digest": ""}
    start = Start(plan, "cpu", sys.argv[1:], state="/nowhere")
    async with Processes().start(start) as child:
        print(child.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
async def test_it_does_not_outlive_a_parent_that_is_killed(ranks: int) -> None:
    program = (sys.executable, "-c", PARENT, *["cpu"] * ranks)
    parent = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, cwd=HOME)
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    assert child.is_running()
    if ranks > 1:  # the child is their launcher
        await eventually(lambda: len(child.children()) == ranks, timeout=60)
    processes = [child, *child.children()]
    parent.kill()
    await parent.wait()
    for process in processes:
        await eventually(lambda one=process: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE)


def test_it_ends_when_its_input_does() -> None:
    program = gang.program(MODULE, ("cpu",))
    done = subprocess.run(program, input=b"", stdout=subprocess.PIPE, cwd=HOME, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


async def test_it_is_gone_after_the_block() -> None:
    async with Processes().start(NOTHING) as child:
        process = psutil.Process(child.pid)
    assert not process.is_running()


async def test_what_it_cannot_do_is_told_without_a_path() -> None:
    async with Processes().start(NOTHING) as child:
        with pytest.raises(errors.Failed) as caught:
            await child.next()
    assert (caught.value.reason, caught.value.message) == ("TRAINING_FAILED", "state.json: cannot be read")
    assert caught.value.transient is False


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("raise SystemExit(3)", "exited with status 3"),
        ("print('[\"Prog', end='')", "exited with status 0"),
    ],
)
async def test_a_death_is_told_and_may_be_tried_again(program: str, how: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = ChildProcess(process)
    with pytest.raises(errors.Failed) as caught:
        await child.save(Path("/nowhere"))
    assert caught.value.message == f"the training process {how}"
    assert (caught.value.reason, caught.value.transient) == ("TRAINING_FAILED", True)


async def test_one_that_told_its_end_is_not_asked_for_another_checkpoint() -> None:
    progress, finished = Progress(1, 64, 1.0, 0.0, []), Finished(1, 64, {})
    told = (dialogue.WORDS.to_line(progress) + dialogue.WORDS.to_line(finished)).decode()
    program = f"import sys; sys.stdin.readline(); sys.stdout.write({told!r}); sys.stdout.flush(); sys.stdin.read()"
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, **pipes)
    child = ChildProcess(process)
    async with asyncio.timeout(20):
        assert await child.save(Path("/nowhere")) is None
        assert await child.next() == progress
        assert await child.save(Path("/nowhere")) is None
        assert await child.next() == finished
    process.kill()
    await process.wait()


def test_what_libraries_print_is_no_answer() -> None:
    program = "import sys, types; from services.training import child; "
    program += "said = types.ModuleType('services.training.session'); "
    program += "said.run = lambda start, commands, send: (print('a library'), send(start)); "
    program += "sys.modules['services.training.session'] = said; child.main()"
    line = dialogue.WORDS.to_line(NOTHING)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], cwd=HOME, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline() == line
        rest, errors_ = process.communicate()
    assert rest == b""
    assert b"a library" in errors_
