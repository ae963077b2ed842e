"""A whole mesh of real processes, as a user starts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from services.runtime.mesh import Mesh

ROOT = Path(__file__).parents[2]


class Up:
    """A running `lensmesh up`."""

    def __init__(self, process: subprocess.Popen[str], mesh: Mesh, state: Path) -> None:
        self.process = process
        self.mesh = mesh
        self.state = state

    def stop(self, number: signal.Signals) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def lensmesh(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "services.cli", *map(str, arguments)]


def processes_of(state: Path) -> list[psutil.Process]:
    """Processes that know the state directory, by their environment or command line."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), process.environ().get("LENSMESH_STATE_DIR", "")]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(state) in word for word in told):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def run_up(state: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Up]:
    with (state.parent / f"{state.name}.stderr").open("w+") as errors:
        process = subprocess.Popen(
            lensmesh("up", "--state", state, "--http", "127.0.0.1:0", "--json", *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            errors.seek(0)
            assert line, errors.read()
            yield Up(process, Mesh.from_json(line), state)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                assert processes_of(state) == []
            process.stdout.close()


@contextmanager
def own_directory() -> Iterator[Path]:
    """A directory that is removed afterwards.

    Not below pytest's: each session that root starts takes that from PostgreSQL's unprivileged user again.
    """
    directory = Path(tempfile.mkdtemp(prefix="lensmesh-e2e-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of this test's own."""
    with own_directory() as made:
        yield made


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of the tests' own instead of the user's."""
    directory = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    yield directory
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def mesh(cache: Path) -> Iterator[Up]:
    """One mesh of topology `local` for the tests that do not harm it."""
    with own_directory() as directory, run_up(directory / "state") as up:
        yield up


@pytest.fixture
def start(directory: Path, cache: Path) -> Iterator[Callable[..., Up]]:
    """Start a mesh of this test's own, to be harmed."""
    running = []

    def begin(*arguments: str, environment: dict[str, str] | None = None) -> Up:
        running.append(run_up(directory / "state", *arguments, environment=environment))
        return running[-1].__enter__()

    yield begin
    for one in running:
        one.__exit__(None, None, None)
