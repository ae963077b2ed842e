"""Training an extension on two devices: what one process learns, through a killed rank, a pause and a cancel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from lensmesh.extensions.v1 import extensions_pb2 as pb
from safetensors.torch import load_file

from services.extensions.adapters.team import TeamProcess
from services.kit.database import Database
from tests.support import eventually
from tests.wire.extensions_support import Mesh
from tests.wire.test_extensions import create, ended, mesh, refused, train, working  # noqa: F401 - a fixture

LORA = pb.LoraConfig(r=4, dropout=0.1)


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids of the launchers that were started."""
    found: list[int] = []
    init = TeamProcess.__init__

    def remember(self: TeamProcess, process: Any) -> None:
        found.append(process.pid)
        init(self, process)

    monkeypatch.setattr(TeamProcess, "__init__", remember)
    return found


async def weights(mesh: Mesh, extension_id: str) -> dict[str, torch.Tensor]:  # noqa: F811
    uri = (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=extension_id))).artifact_uri
    folder: Path = mesh.context.artifacts.root / uri.removeprefix("artifact://")
    return load_file(folder / "lora" / "adapter_model.safetensors")


async def test_two_ranks_learn_what_one_process_does(
    mesh: Mesh,  # noqa: F811
    teams: list[int],
    tmp_path: Path,
) -> None:
    config = tmp_path / "models" / "gpt2" / "config.json"
    without_dropout = json.loads(config.read_text()) | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config.unlink()
    config.write_text(json.dumps(without_dropout))
    alone, together = [await create(mesh, lora=pb.LoraConfig(r=4, dropout=0.0)) for _ in range(2)]
    options = {"evaluate_every": 4, "patience": 3}
    async with working(mesh):
        first = await ended(mesh, await train(mesh, alone.id, **options))
        assert teams == []
        second = await ended(mesh, await train(mesh, together.id, devices=2, **options))
    assert (first.state, second.state) == ("completed", "completed"), second
    assert len(teams) == 1
    assert not psutil.pid_exists(teams[0])
    assert second.result["loss_after"] == pytest.approx(first.result["loss_after"], rel=1e-3)
    assert second.result["loss_after"] < second.result["loss_before"] - 0.1
    assert (second.result["tokens"], second.result["best_step"]) == (first.result["tokens"], first.result["best_step"])
    ours, theirs = await weights(mesh, together.id), await weights(mesh, alone.id)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-4)
    assert mesh.registry.ledger == {}


@pytest.mark.demo
async def test_a_killed_rank_and_a_pause_change_no_bit(
    mesh: Mesh,  # noqa: F811
    teams: list[int],
    database: Database,
) -> None:
    """Dropout is on: every rank goes on with random numbers of its own."""
    whole, cut = [await create(mesh, lora=LORA) for _ in range(2)]
    async with working(mesh):
        expected = await ended(mesh, await train(mesh, whole.id, steps=30, devices=2))
    assert expected.state == "completed", expected
    job_id = await train(mesh, cut.id, steps=30, devices=2)

    async def progressed(percent: float) -> bool:
        return (await mesh.context.jobs.get(job_id)).progress > percent

    async with working(mesh, "w1"):
        await eventually(lambda: progressed(10), timeout=60)
    assert not psutil.pid_exists(teams[-1])
    assert await database.pool.fetchval("SELECT checkpoint_uri FROM extension_trainings WHERE job_id = $1", job_id)
    async with working(mesh, "w2"):
        await eventually(lambda: len(teams) == 3, timeout=60)
        ranks = await eventually(lambda: two_of(teams[-1]), timeout=60)
        ranks[1].kill()
        job = await ended(mesh, job_id)
    assert job.state == "completed", job
    assert len(teams) == 4
    results = [await mesh.stub.GetExtension(pb.GetExtensionRequest(id=x.id)) for x in (whole, cut)]
    assert results[0].digest == results[1].digest
    assert not await database.pool.fetchval("SELECT count(*) FROM artifacts WHERE kind = 'extension_checkpoint'")
    assert mesh.registry.ledger == {}


async def test_a_cancelled_team_leaves_nothing(mesh: Mesh, teams: list[int]) -> None:  # noqa: F811
    made = await create(mesh)
    job_id = await train(mesh, made.id, steps=100_000, devices=2)
    async with working(mesh):
        await eventually(lambda: begun(mesh, job_id), timeout=60)
        ranks = two_of(teams[0])
        assert ranks is not None
        await mesh.context.jobs.request_cancel(job_id)
        job = await ended(mesh, job_id)
    assert job.state == "cancelled"
    await eventually(lambda: all(gone(rank) for rank in ranks))
    assert mesh.registry.ledger == {}
    assert (await mesh.stub.GetExtension(pb.GetExtensionRequest(id=made.id))).digest == made.digest


@pytest.mark.parametrize(
    ("created", "asked", "field"),
    [
        ({}, {"devices": 3}, "batch_size"),
        ({"freeze_base": False}, {"devices": 2}, "devices"),
        ({}, {"devices": 65}, "devices"),
        ({}, {"devices": -1}, "devices"),
    ],
)
async def test_what_devices_cannot_share_is_refused(
    mesh: Mesh,  # noqa: F811
    database: Database,
    created: dict[str, Any],
    asked: dict[str, Any],
    field: str,
) -> None:
    made = await create(mesh, **created)
    code, _, fields = await refused(train(mesh, made.id, **asked))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 0


def two_of(launcher: int) -> list[psutil.Process] | None:
    """The ranks of a launcher in their order, once both are there."""
    try:
        ranks = psutil.Process(launcher).children()
        ranks.sort(key=lambda rank: rank.environ()["RANK"])
    except (psutil.Error, KeyError):
        return None
    return ranks if len(ranks) == 2 else None


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def begun(mesh: Mesh, job_id: str) -> bool:  # noqa: F811
    return (await mesh.context.jobs.get(job_id)).progress > 0
