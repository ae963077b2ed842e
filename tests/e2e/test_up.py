"""`lensmesh up` as a script sees it: one line when ready, one line when not, and nothing left behind."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from services.runtime.mesh import read_mesh
from tests.e2e.conftest import ROOT, Up, lensmesh, processes_of

PROCESSES = {"supervisor", "postgres", "nats", "registry", "device-0", "gateway"}


def refused(*arguments: str | Path) -> str:
    """What `up` says when it does not start; one line."""
    done = subprocess.run(lensmesh("up", *arguments), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_is_printed_when_ready(mesh: Up):
    told = mesh.mesh
    assert set(told.pids) == PROCESSES
    assert all(psutil.pid_exists(pid) for pid in told.pids.values())
    assert told.pids["supervisor"] == mesh.process.pid
    assert set(told.grpc) == {"registry", "extraction", "training", "extensions"}
    assert set(told.metrics) == PROCESSES - {"postgres", "nats"}
    assert httpx.get(f"{told.gateway}/readyz").status_code == 200
    assert httpx.get(f"{told.gateway}/api/models", headers={"authorization": f"Bearer {told.token}"}).status_code == 200
    for url in told.metrics.values():
        assert "# TYPE" in httpx.get(url).text


def test_the_line_is_kept_for_others_but_not_for_everybody(mesh: Up):
    assert read_mesh(mesh.state) == mesh.mesh
    assert (mesh.state / "mesh.json").stat().st_mode & 0o077 == 0
    for secret in (mesh.state / "keys").iterdir():
        assert secret.stat().st_mode & 0o077 == 0


def test_no_secret_stands_on_a_command_line(mesh: Up):
    secrets = [path.read_text().strip() for path in (mesh.state / "keys").iterdir() if path.suffix != ".json"]
    for process in processes_of(mesh.state):
        assert not [secret for secret in secrets if secret in " ".join(process.cmdline())]


def test_a_second_mesh_in_the_same_directory_is_refused_and_the_first_goes_on(mesh: Up):
    said = refused("--state", mesh.state, "--http", "127.0.0.1:0", "--json")
    assert said == f"lensmesh: a mesh already runs in {mesh.state} (supervisor process {mesh.process.pid})\n"
    assert httpx.get(f"{mesh.mesh.gateway}/readyz").status_code == 200
    assert read_mesh(mesh.state) == mesh.mesh


def test_a_port_in_use_is_one_clear_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert (
            refused("--state", tmp_path, "--http", address)
            == f"lensmesh: cannot listen on {address}: Address already in use\n"
        )
    assert processes_of(tmp_path) == []


def test_a_state_directory_that_cannot_be_written_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").touch()
    said = refused("--state", tmp_path / "file" / "state", "--http", "127.0.0.1:0")
    assert said == f"lensmesh: the state directory {tmp_path}/file/state is not writable: Not a directory\n"


@pytest.mark.parametrize(
    ("arguments", "said"), [(("--topology", "x"), "no topology 'x'"), (("--http", "x"), "HOST:PORT")]
)
def test_a_wrong_option_is_one_clear_line(tmp_path: Path, arguments: tuple[str, str], said: str):
    assert said in refused("--state", tmp_path / "state", *arguments)
    assert not (tmp_path / "state").exists()
