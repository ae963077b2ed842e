"""The mesh a demo runs on: the one that runs in the state directory, or one of its own that ends with the last demo."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.runtime.errors import StartError
from services.runtime.lifeline import Lifeline
from services.runtime.mesh import Mesh, open_state, read_mesh
from services.runtime.topology import load_topology


@contextmanager
def running_mesh(state: Path, topology: str) -> Iterator[Mesh]:
    """A mesh for as long as the block runs.

    Several demos may run in one state directory at once: the one that started the mesh stops it when no other uses it.

    Raises:
        StartError: the mesh cannot start, or another topology runs there.
    """
    open_state(state)
    with (state / "demo.starting").open("w") as starting, (state / "demo.running").open("w") as running:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_SH)  # waits while another demo stops its mesh
        mesh, process = read_mesh(state), None
        lifeline = Lifeline()
        if mesh is None:
            mesh, process = _start(state, topology, lifeline)
        try:
            _check_topology(mesh, state, topology)
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield mesh
            fcntl.flock(running, fcntl.LOCK_UN)
            if process is not None:
                fcntl.flock(running, fcntl.LOCK_EX)  # until no other demo runs
        finally:
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait()
            lifeline.close()


def _start(state: Path, topology: str, lifeline: Lifeline) -> tuple[Mesh, subprocess.Popen[str]]:
    command = [sys.executable, "-m", "services.cli", "up", "--state", str(state), "--topology", topology]
    process = subprocess.Popen(
        [*command, "--http", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **lifeline.environment()},
        start_new_session=True,  # a terminal's Ctrl-C is for the demo, which then stops the mesh
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if not line:
        raise StartError(f"the mesh did not start (exit status {process.wait()})")
    return Mesh.from_json(line), process


def _check_topology(mesh: Mesh, state: Path, topology: str) -> None:
    wanted = {process.name for process in load_topology(topology).processes}
    if not wanted <= set(mesh.pids):
        raise StartError(f"a mesh of another topology than {topology} runs in {state}")
