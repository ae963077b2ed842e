"""What dies comes back, a process or the database under all of them, and the rest of the mesh goes on meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import psutil
import pytest
from lensmesh.registry.v1 import models_pb2, models_pb2_grpc
from lensmesh.residency.v1 import residency_pb2, residency_pb2_grpc

from gateway.backends import READY
from services.client.api import Event, follow_job
from services.client.http import HttpApi
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.runtime.mesh import Mesh, read_mesh
from services.runtime.postgres import url_of_running
from tests.e2e.conftest import Up, own_directory, processes_of, run_up
from tests.support import eventually
from tests.wire.registry_support import refused

ASKED = [
    ("GET", "/api/models", None),
    ("GET", "/api/models/{model}", None),
    ("GET", "/api/v2/groups/{group}/status", None),
    ("GET", "/api/devices", None),
    ("GET", "/api/jobs", None),
    ("GET", "/api/extractions", None),
    ("GET", "/api/training-jobs", None),
    ("GET", "/api/extensions", None),
    ("POST", "/api/models", {"name": "new", "source": "local", "model_identifier": "tiny-gpt2"}),
    ("POST", "/api/models/{model}/unload", {}),
    ("POST", "/api/v2/groups/{group}/switch", {"lens_id": None}),
    ("POST", "/api/v2/groups/{group}/analyze", {"text": "def"}),
]
"""Requests of every service, some of them writes."""


@pytest.fixture(scope="module")
def harmed(cache: Path) -> Iterator[Up]:
    """One mesh that the tests of this file harm; the first leaves it working, the other one ends it."""
    patient = {"LENSMESH_HOST_TIMEOUT": "120"}
    with own_directory() as directory, run_up(directory / "state", environment=patient) as up:
        yield up


async def test_a_mesh_outlives_its_database(harmed: Up) -> None:
    api = HttpApi(harmed.mesh.gateway, harmed.mesh.token)
    pids = now(harmed).pids
    served, other = _group(api, "served"), _group(api, "other")
    api.call("LoadModel", id=served["model"])
    await eventually(lambda: api.call("GetGroupStatus", id=served["group"]).get("fully_loaded"), timeout=60)
    api.call("SwitchLens", id=served["group"], lens_id=served["lens"])
    async with _device(harmed) as device, _client(harmed) as http:
        held = await _held(device)
        with _suspended(pids["device-0"]):  # so that the job still runs when the database goes
            job = (await http.post(f"/api/v2/groups/{other['group']}/preload", json={})).json()["task_id"]
            heard = asyncio.create_task(asyncio.to_thread(_heard, harmed, job))
            await eventually(lambda: api.call("GetJob", id=job)["status"] == "running")
            supervisor = psutil.Process(pids["supervisor"])
            supervisor.suspend()  # it would start PostgreSQL again
            await _gone(pids["postgres"])
        try:
            for answer in await asyncio.gather(*(http.request(m, p.format(**served), json=b) for m, p, b in ASKED)):
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (503, "DATABASE_UNAVAILABLE"), answer.url
                assert error["message"] == "The database does not answer"
                assert answer.headers["retry-after"] == "1"
            await _refused_to_stubs(harmed, served["model"])
            await eventually(lambda: _readiness(http, 503, "database: The database does not answer"), 60, 0.1)
            assert await _held(device) == held
        finally:
            supervisor.resume()

        await eventually(lambda: _readiness(http, 200, READY), 60, 0.1)
        events = await heard
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[-1].name.endswith(":completed")
        found = await _held(device)
        assert found[served["model"]] == held[served["model"]]
        assert list(found[other["model"]]["lenses"]) == [other["lens"]]
        (ledger,) = api.call("ListDevices")["devices"]
        assert ledger["used_bytes"] == sum(model["bytes"] for model in found.values())
        assert not ledger.get("reserved_bytes")
        status = api.call("GetGroupStatus", id=served["group"])
        assert (status["active_lens_id"], status["fully_loaded"]) == (served["lens"], True)

        api.call("SwitchLens", id=served["group"])
        api.call("SwitchLens", id=other["group"], lens_id=other["lens"])
        found = await _held(device)
        assert [found[each["model"]]["active"] for each in (served, other)] == ["", other["lens"]]
    await eventually(lambda: _all_relayed(harmed), 60, 0.1)
    after = now(harmed).pids
    assert {name for name in pids if after[name] != pids[name]} == {"postgres"}


@pytest.mark.timeout(240)
async def test_what_a_killed_supervisor_leaves_is_taken_over_and_killed_processes_come_back(harmed: Up) -> None:
    api = HttpApi(harmed.mesh.gateway, harmed.mesh.token)
    made = api.call("CreateDataset", name="kept", source="inline", texts=["hello"])
    harmed.process.kill()
    harmed.process.wait()
    await eventually(lambda: [one for one in processes_of(harmed.state) if one.name() != "postgres"] == [])
    with run_up(harmed.state) as up:
        api = HttpApi(up.mesh.gateway, up.mesh.token)
        assert api.call("GetDataset", id=made["id"])["name"] == "kept"
        before = now(up)
        assert set(before.pids.values()) <= {one.pid for one in processes_of(up.state)}
        for name in ("gateway", "registry", "nats", "device-0"):
            os.kill(before.pids[name], signal.SIGKILL)
            await eventually(lambda name=name: now(up).pids.get(name) not in (None, before.pids[name]), timeout=60)
            await eventually(lambda: _answers(api), timeout=60)
        after = now(up)
        assert (after.gateway, after.grpc, after.metrics) == (before.gateway, before.grpc, before.metrics)
        assert up.stop(signal.SIGINT) == 0
    assert not [name for name, pid in after.pids.items() if psutil.pid_exists(pid)]
    assert processes_of(up.state) == []
    assert read_mesh(up.state) is None


def now(up: Up) -> Mesh:
    """The mesh with its present process ids."""
    mesh = read_mesh(up.state)
    assert mesh is not None
    return mesh


def _answers(api: HttpApi) -> bool:
    try:
        return any(device["alive"] for device in api.call("ListDevices")["devices"])
    except Exception:  # whatever it is, it is not an answer yet
        return False


def _group(api: HttpApi, name: str) -> dict[str, str]:
    """Ids of a model, a group on it and its lens."""
    model = api.call("CreateModel", name=name, source="local", model_identifier="tiny-gpt2")["id"]
    group = api.call("CreateGroup", name=name, model_id=model)["id"]
    return {"model": model, "group": group, "lens": api.call("AttachLens", group_id=group, kind="logit_lens")["id"]}


@contextmanager
def _suspended(pid: int) -> Iterator[None]:
    """The process stands still inside the block."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def _gone(postmaster: int) -> None:
    """Kill PostgreSQL; its sessions end when they see it."""
    server = psutil.Process(postmaster)
    family = [server, *server.children()]
    server.kill()
    await eventually(lambda: not any(map(_alive, family)))


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # its parent stands still
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def _device(up: Up) -> AsyncIterator[residency_pb2_grpc.ModelHostServiceStub]:
    """What the registry asks, too."""
    async with open_channel(up.mesh.grpc["extraction"], Settings(state_dir=up.state)) as channel:
        yield residency_pb2_grpc.ModelHostServiceStub(channel)


def _client(up: Up) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {up.mesh.token}", "x-request-timeout": "20"}
    return httpx.AsyncClient(base_url=up.mesh.gateway, headers=headers, timeout=30, trust_env=False)


async def _held(device: residency_pb2_grpc.ModelHostServiceStub) -> dict[str, dict[str, Any]]:
    """What is on the device, by itself."""
    state = await device.GetState(residency_pb2.GetStateRequest(), timeout=20)
    return {
        model.model_id: {
            "process": state.incarnation,
            "bytes": model.memory_bytes,
            "fingerprint": model.fingerprint,
            "lenses": [lens.lens_id for lens in model.lenses],
            "active": model.active_lens_id,
        }
        for model in state.models
    }


def _heard(up: Up, job_id: str) -> list[Event]:
    """Every event of a job, as a client follows it across the outage."""
    return list(follow_job(HttpApi(up.mesh.gateway, up.mesh.token), job_id))


async def _refused_to_stubs(up: Up, model_id: str) -> None:
    metadata = [("authorization", f"Bearer {up.mesh.token}")]
    async with grpc.aio.insecure_channel(up.mesh.grpc["registry"]) as channel:
        get = models_pb2_grpc.ModelServiceStub(channel).GetModel
        failure = await refused(get(models_pb2.GetModelRequest(id=model_id), metadata=metadata, timeout=20))
    assert (failure.code, failure.reason, failure.retry_seconds) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE", 1.0)


async def _readiness(http: httpx.AsyncClient, status: int, state: str) -> bool:
    """Whether the gateway answers with this status, since this is the state of all services."""
    answer = await http.get("/readyz")
    return answer.status_code == status and set(answer.json()["backends"].values()) == {state}


async def _all_relayed(up: Up) -> bool:
    """Whether NATS has every event."""
    connection = await asyncpg.connect(url_of_running(up.state))
    try:
        return await connection.fetchval("SELECT count(*) FROM events WHERE relayed_at IS NULL") == 0
    finally:
        await connection.close()
