"""Every check of the demo holds on good replies and is missed on the bad one that it is there for."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from services.client.api import ApiError, Event
from services.demo.corpus import Corpus
from services.demo.journey import Journey, Step
from services.demo.run import STEPS, travel

TOKEN = {"token": "x", "features": [{"feature": 7, "activation": 1.5}], "layers": [{"predictions": [{"token_id": 1}]}]}
GOOD: dict[str, Any] = {
    "ListDevices": {
        "devices": [
            {"alive": True, "services": ["extraction", "training", "extensions"], "name": "d/cpu", "kind": "cpu",
             "budget_bytes": 1},
        ]
    },
    "CreateModel": {"id": "m_1"},
    "CreateDataset": {"id": "ds_1", "size_bytes": 1, "digest": "train"},
    "GetDataset": {"id": "ds_2", "size_bytes": 1, "digest": "held out"},
    "LoadModel": {
        "status": "loading", "task_id": "t",
        "plan": {"required_memory_bytes": 1, "placements": [{"device": "d/cpu", "fits": True}]},
    },
    "GetModel:int8": {"memory_usage_bytes": 1, "load_time_seconds": 0.1},
    "GetModel:none": {"memory_usage_bytes": 2, "load_time_seconds": 0.1},
    "MeasurePerplexity:int8": {"perplexity": 40.2},
    "MeasurePerplexity:none": {"perplexity": 40.0},
    "ExtractActivations": {"extraction_id": "ext_1"},
    "GetExtraction:1": {
        "status": "completed", "job_id": "job_1", "reused": False, "tokens": 100, "hook_points": ["a", "b", "c", "d"],
        "file_size_bytes": 1, "identity_error": 1e-6, "cache_id": "c_1",
    },
    "GetExtraction:2": {
        "status": "completed", "job_id": "job_1", "reused": True, "tokens": 100, "message": "Using cached activations",
        "extraction_time_seconds": 0.0, "cache_id": "c_1",
    },
    "CreateTrainingJob": {"id": "job_2"},
    "GetTrainingJob": {"transcoder_ids": ["tc_1", "tc_2"], "tokens_seen": 200},
    "GetTranscoder:1": {"layer": 1, "id": "tc_1", "train_fvu": 0.2},
    "GetTranscoder:2": {"layer": 2, "id": "tc_2", "train_fvu": 0.1},
    "EvaluateTranscoder": {"job_id": "job_3"},
    "ListEvaluations": {
        "evaluations": [
            {"job_id": "job_3", "fvu": 0.14, "fvu_per_prefix": [0.3, 0.2, 0.15, 0.14], "l0": 32.0, "dead_fraction": 0.1,
             "ce_recovered": 0.92},
        ]
    },
    "CreateGroup": {"id": "grp_1"},
    "AttachLens:1": {"id": "lens_1"},
    "AttachLens:2": {"id": "lens_2"},
    "AttachLens:3": {"id": "lens_3"},
    "AttachLens:4": {"id": "lens_4"},
    "SwitchLens": {"seconds": 0.001},
    "GetGroupStatus": {"fully_loaded": True},
    "AnalyzeText:1": {
        "readings": [
            {"lens_id": f"lens_{number}", "kind": "transcoder", "tokens": [{"token": "<s>"}, TOKEN]}
            for number in (1, 2, 3)
        ]
    },
    "AnalyzeText:2": {"readings": [{"tokens": [TOKEN]}]},
    "AnalyzeText:3": {"readings": [{"tokens": [{"predictions": [1], "base_predictions": [2]}]}]},
    "AnalyzeText:4": {"readings": [{"tokens": [TOKEN]}]},
    "CreateExtension": {"id": "x_1", "parameter_counts": {"trainable": 1}},
    "EvaluateExtension:1": {"loss": 4.6, "base_loss": 4.6},
    "EvaluateExtension:2": {"loss": 4.2, "base_loss": 4.6, "base_unchanged": True},
    "TrainExtension": {"job_id": "job_4"},
    "ActivateExtension": {"seconds": 0.01, "active": True},
    "DeactivateExtension": {"seconds": 0.01, "active": False},
    "GetExtension": {"status": "trained"},
}  # fmt: skip


class Mesh:
    """Answers a call by its name, or by name and which time it is called, or by the quantization that is loaded."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies
        self.times: dict[str, int] = {}
        self.loaded = ""

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        self.times[rpc] = self.times.get(rpc, 0) + 1
        self.loaded = fields.get("quantization", self.loaded)
        time.sleep(self.replies.get("seconds", {}).get(rpc, 0.0))
        keys = (f"{rpc}:{self.times[rpc]}", f"{rpc}:{self.loaded}", rpc)
        reply = next((self.replies[key] for key in keys if key in self.replies), {})
        if isinstance(reply, ApiError):
            raise reply
        return reply

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        name = "model:ready" if rpc == "WatchModel" else "job:completed"
        yield Event(name, fields["after_sequence"] + 1, {"task_id": "t"})


def run(replies: dict[str, Any]) -> list[Step]:
    journey = Journey(
        api=Mesh(replies),
        console=Console(quiet=True),
        corpus=Corpus("a", "b", "c", "d"),
        model_source="local",
        model_identifier="tiny-gpt2",
        thresholds=True,
        tokens=100,
    )
    return travel(journey)


def missed(replies: dict[str, Any]) -> dict[str, list[str]]:
    return {step.name: step.missed for step in run(replies) if step.missed}


def test_good_replies_hold():
    steps = run(GOOD)
    assert {step.name: step.missed for step in steps if step.missed} == {}
    assert [step.name for step in steps] == [*(name for name, _ in STEPS), "summary"]
    figures = {step.name: step.to_json()["figures"] for step in steps}
    assert figures["train"]["train_fvu"] == 0.1
    assert figures["evaluate"]["fvu"] == 0.14
    assert figures["summary"] == {"steps": 9, "steps_ok": 9, "total_seconds": figures["summary"]["total_seconds"]}


@pytest.mark.parametrize(
    ("reply", "change", "step", "words"),
    [
        ("ListDevices", {"devices": []}, "doctor", "offers every service"),
        ("LoadModel", {"plan": {"required_memory_bytes": 1, "placements": []}}, "load", "fits a device"),
        ("MeasurePerplexity:int8", {"perplexity": 40.5}, "load", r"within 1 % (it is off by +1.25%)"),
        ("GetModel:int8", {"memory_usage_bytes": 3}, "load", "fewer bytes"),
        ("GetDataset", {"digest": "train"}, "dataset", "differ"),
        ("GetExtraction:1", {"tokens": 99}, "extract", "holds 100 tokens"),
        ("GetExtraction:1", {"hook_points": ["a"]}, "extract", "every site"),
        ("GetExtraction:1", {"identity_error": 0.1}, "extract", "recomputed"),
        ("GetExtraction:2", {"reused": False}, "extract_again", "from the cache"),
        ("GetExtraction:2", {"cache_id": "c_2"}, "extract_again", "same cache"),
        ("GetTrainingJob", {"tokens_seen": 199}, "train", "200 tokens"),
        ("GetTrainingJob", {"transcoder_ids": ["tc_1"]}, "train", "each layer"),
        ("GetGroupStatus", {"fully_loaded": False}, "group", "every lens are on the device"),
        ("AnalyzeText:1", {"readings": []}, "group", "reads the sentence"),
        ("EvaluateExtension:1", {"loss": 4.7}, "extension", "untrained extension"),
        ("EvaluateExtension:2", {"loss": 4.6}, "extension", "lowers"),
        ("EvaluateExtension:2", {"base_unchanged": False}, "extension", "restored exactly"),
        ("DeactivateExtension", {"active": True}, "extension", "only then"),
        (
            "AnalyzeText:3",
            {"readings": [{"tokens": [{"predictions": [1], "base_predictions": [1]}]}]},
            "extension",
            "changes",
        ),
        (
            "AnalyzeText:4",
            {"readings": [{"tokens": [{"layers": [{"predictions": [2]}]}]}]},
            "extension",
            "restored exactly",
        ),
    ],
)
def test_a_bad_reply_is_missed_where_it_matters(reply: str, change: dict[str, Any], step: str, words: str):
    replies = copy.deepcopy(GOOD)
    replies[reply] |= change
    found = missed(replies)
    assert any(words in one for one in found[step]), found
    assert found["summary"] == ["every step's checks held"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fvu": 0.151}, "FVU is at most 0.15"),
        ({"ce_recovered": 0.89}, "CE recovered is at least 0.9"),
        ({"fvu_per_prefix": [0.14]}, "every prefix"),
        ({"fvu_per_prefix": [0.1, 0.2, 0.15, 0.14]}, "better than its first prefix"),
    ],
)
def test_a_poor_transcoder_is_missed(change: dict[str, Any], words: str):
    replies = copy.deepcopy(GOOD)
    replies["ListEvaluations"]["evaluations"][0] |= change
    assert any(words in one for one in missed(replies)["evaluate"])


def test_slow_switches_are_missed():
    found = missed(copy.deepcopy(GOOD) | {"seconds": {"SwitchLens": 0.025}})
    assert found["group"] == ["a resident lens is switched in 20 ms"]


def test_after_a_step_that_could_not_be_carried_out_the_rest_is_not_tried():
    found = missed(copy.deepcopy(GOOD) | {"CreateTrainingJob": ApiError("UNREACHABLE", "gone")})
    assert found["train"] == ["UNREACHABLE: gone"]
    assert [name for name, words in found.items() if words == ["not tried"]] == ["evaluate", "group", "extension"]


def test_a_step_is_told_as_json():
    step = Step("train", 1.23456, {"a": 1}, ["b"])
    assert step.to_json() == {"name": "train", "ok": False, "seconds": 1.235, "figures": {"a": 1, "missed": ["b"]}}
