"""kill -9 of the device process in the middle of a job: the job goes on where it stood, and watchers miss nothing.

`pytest -m demo`; what each kind of job does after a kill is checked by tests/wire in CI.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from rich.console import Console

from services.client.api import Event, follow_job
from services.client.http import HttpApi
from services.demo.journey import Journey, Step
from services.demo.model import dataset, load
from services.demo.run import plan_journey
from services.runtime.mesh import read_mesh
from tests.e2e.conftest import Up

TOKENS = 150_000


def follow_and_kill(up: Up, api: HttpApi, job_id: str) -> list[Event]:
    """Every event of a job whose process is killed at the first progress; the same events seen from the start."""
    seen: list[Event] = []
    killed = 0
    for event in follow_job(api, job_id):
        seen.append(event)
        if not killed and event.name.endswith(":progress") and 0 < event.data["progress"] < 90:
            mesh = read_mesh(up.state)
            assert mesh is not None
            killed = mesh.pids["device-0"]
            os.kill(killed, signal.SIGKILL)
    assert killed, "the job was over before it could be disturbed"
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert list(follow_job(api, job_id)) == seen
    return seen


def extract(journey: Journey, up: Up, api: HttpApi) -> dict[str, object]:
    fields = {"layer_indices": [2], "sites": ["mlp_in", "mlp_out"], "max_tokens": TOKENS, "batch_size": 8}
    queued = api.call("ExtractActivations", model_id=journey.model_id, dataset_id=journey.train_dataset_id, **fields)
    extraction = api.call("GetExtraction", id=queued["extraction_id"])
    events = follow_and_kill(up, api, extraction["job_id"])
    assert events[-1].name == "extraction:completed"
    assert api.call("GetJob", id=extraction["job_id"])["attempt"] == 2
    return api.call("GetExtraction", id=queued["extraction_id"])


def train(journey: Journey, up: Up, api: HttpApi, cache_id: str) -> dict[str, object]:
    job = api.call(
        "CreateTrainingJob",
        model_id=journey.model_id,
        layers=[2],
        source={"cache_id": cache_id},
        dict_size=1024,
        group_sizes=[256, 768],
        top_k=16,
        num_tokens=4 * TOKENS,
    )
    events = follow_and_kill(up, api, job["id"])
    assert events[-1].name == "training:completed"
    assert api.call("GetJob", id=job["id"])["attempt"] == 2
    return api.call("GetTrainingJob", id=job["id"])


@pytest.mark.demo
@pytest.mark.timeout(400)
def test_jobs_survive_the_death_of_their_process(start: Callable[..., Up]):
    up = start(environment={"LENSMESH_JOB_LEASE_SECONDS": "5"})
    api = HttpApi(up.mesh.gateway, up.mesh.token)
    journey = plan_journey(api, Console(quiet=True), "")
    for step in (load, dataset):
        step(journey, Step(step.__name__))
    extraction = extract(journey, up, api)
    assert extraction["tokens"] == TOKENS
    assert api.call("VerifyActivationCache", id=extraction["cache_id"])["ok"]
    trained = train(journey, up, api, str(extraction["cache_id"]))
    assert trained["status"] == "completed"
    assert trained["tokens_seen"] >= 4 * TOKENS
    assert len(trained["transcoder_ids"]) == 1
