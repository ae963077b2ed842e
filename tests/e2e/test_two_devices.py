"""Topology `dual-cpu`: two trainings side by side, and one of a model that neither process has room for.

Run it with `pytest -m demo`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from services.client.api import ApiError, follow_job
from services.client.http import HttpApi
from tests import models
from tests.e2e.conftest import Up

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]
LIMIT = 190_000_000
"""Bytes of each process; the wide model takes 151 MB, and 58 MB for a forward."""
SMALL = {"dict_size": 256, "top_k": 8, "batch_size": 64}


@pytest.fixture
def roots(directory: Path) -> Path:
    """A small model, and one of 38 million parameters."""
    folder = directory / "models"
    models.copied(folder, "gpt2")
    config = GPT2Config(vocab_size=models.VOCAB, n_positions=64, n_embd=512, n_layer=12, n_head=8)
    GPT2LMHeadModel(config).save_pretrained(folder / "wide")
    models.tokenizer().save_pretrained(folder / "wide")
    return folder


@pytest.fixture
def api(start: Callable[..., Up], roots: Path) -> HttpApi:
    limits = {"LENSMESH_DEVICE_MEMORY_LIMIT": str(LIMIT), "LENSMESH_MODEL_ROOTS": str(roots)}
    up = start("--topology", "dual-cpu", environment=limits)
    return HttpApi(up.mesh.gateway, up.mesh.token)


def registered(api: HttpApi, name: str) -> tuple[str, str]:
    """A model of the roots, and a text to train on."""
    model = api.call("CreateModel", name=name, source="local", model_identifier=name, quantization="none")
    texts = [f"{models.TEXTS[number % 5]} {number}" for number in range(60)]
    return model["id"], api.call("CreateDataset", name=name, source="inline", texts=texts)["id"]


def reserved(api: HttpApi) -> list[int]:
    return [int(device["reserved_bytes"]) for device in api.call("ListDevices")["devices"]]


def until_it_trains(api: HttpApi, job: dict[str, Any]) -> None:
    for event in follow_job(api, job["id"]):
        if event.name == "training:progress":
            return
    raise AssertionError("it ended before it told a step")


def test_two_trainings_run_side_by_side_one_on_each(api: HttpApi) -> None:
    model_id, dataset_id = registered(api, "gpt2")
    wanted = {"model_id": model_id, "layers": [1], "source": {"dataset_id": dataset_id}, "num_tokens": 10**8, **SMALL}
    jobs = [api.call("CreateTrainingJob", **wanted, seed=seed) for seed in (1, 2)]
    for job in jobs:
        until_it_trains(api, job)
    assert min(reserved(api)) > 0
    for job in jobs:
        api.call("CancelTrainingJob", id=job["id"])


def test_a_model_that_neither_has_room_for_is_trained_on_over_both(api: HttpApi) -> None:
    model_id, dataset_id = registered(api, "wide")
    with pytest.raises(ApiError) as caught:
        api.call("LoadModel", id=model_id)
    assert caught.value.code == "INSUFFICIENT_MEMORY"
    source = {"dataset_id": dataset_id, "live": True, "split": True}
    wanted = {"model_id": model_id, "layers": [10], "source": source, "devices": 2, "num_tokens": 200 * 64, **SMALL}
    job = api.call("CreateTrainingJob", **wanted)
    until_it_trains(api, job)
    first, second = reserved(api)
    assert first == second > LIMIT / 2
    *_, last = follow_job(api, job["id"])
    assert last.name == "training:completed"
    done = api.call("GetTrainingJob", id=job["id"])
    assert (done["status"], done["step"], len(done["transcoder_ids"])) == ("completed", 200, 1)
    assert reserved(api) == [0, 0]
    judged = {"id": done["transcoder_ids"][0], "dataset_id": dataset_id, "num_batches": 4, "batch_size": 8}
    queued = api.call("EvaluateTranscoder", **judged, devices=2)
    *_, last = follow_job(api, queued["job_id"])
    assert last.name == "evaluation:completed", last
    found = api.call("ListEvaluations", id=judged["id"])["evaluations"][0]
    assert found["ce_clean"] > 0 < found["fvu"] < 1
    assert reserved(api) == [0, 0]
