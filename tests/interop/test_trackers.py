"""A training's figures arrive in the files of the real wandb and trackio, which stay on this machine.

Run it with `pytest -m interop`; it installs from the package index, a minute the first time.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lensmesh.training.v1 import training_pb2 as pb

from services.kit.database import Database
from services.training.adapters import trackers
from tests.interop.environments import interpreter_with
from tests.wire.extraction_support import DATASET
from tests.wire.test_training import texts
from tests.wire.training_support import Mesh, meshing

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]
REQUIREMENTS = ("trackio>=0.5", "wandb>=0.17")
READER = Path(__file__).with_name("tracked.py")


@pytest.fixture(scope="session")
def python() -> Path:
    return interpreter_with(*REQUIREMENTS)


@pytest.fixture
async def mesh(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Path
) -> AsyncIterator[Mesh]:
    """The trackers are imported from their environment where ours has none."""
    (packages,) = (python.parent.parent / "lib").glob("python*/site-packages")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "state" / "trackers"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60)}
        yield mesh


def kept(python: Path, tracker: str, folder: Path, run: str) -> dict[int, dict[str, float]]:
    """By step, what the tracker's files hold."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # nothing of ours is importable there
    done = subprocess.run(
        [python, READER, tracker, folder, trackers.PROJECT, run],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(step): values for step, values in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
async def test_every_figure_that_is_told_arrives(tracker: str, mesh: Mesh, python: Path, tmp_path: Path) -> None:
    job = await mesh.trained(tracker=tracker)
    if tracker == "wandb":
        sys.modules["wandb"].teardown()  # its process writes the file's end when it goes
    found = await asyncio.to_thread(kept, python, tracker, tmp_path / "state" / "trackers", job.id)
    history = await mesh.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(id=job.id))
    assert sorted(found) == [point.step for point in history.points]
    for point in history.points:
        for number, coder in enumerate(point.coders):
            for name in ("loss", "fvu", "l0", "dead_fraction"):
                assert found[point.step][f"coder_{number}/{name}"] == getattr(coder, name)
            for prefix, fvu in enumerate(coder.fvu_per_prefix):
                assert found[point.step][f"coder_{number}/fvu_per_prefix/{prefix}"] == fvu
        mean = sum(coder.fvu for coder in point.coders) / len(point.coders)
        assert found[point.step]["fvu"] == pytest.approx(mean)
    assert found[history.points[-1].step]["tokens_seen"] == job.tokens_seen
