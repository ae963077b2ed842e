from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli import app
from services.client import output
from services.client.api import ApiError, Event
from services.client.http import ROUTES


class FakeApi:
    """Answers from a table, keeps the calls."""

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.events: list[Event] = []

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        self.calls.append((rpc, fields))
        reply = self.replies.get(rpc, {})
        if isinstance(reply, list):
            reply = reply.pop(0)
        if isinstance(reply, ApiError):
            raise reply
        return reply

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        self.calls.append((rpc, fields))
        yield from self.events

    def close(self) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setattr(output, "connect", lambda: api)
    return api


@pytest.fixture
def lensmesh() -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_load_is_followed_until_it_is_ready(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"LoadModel": {"status": "loading", "task_id": "t"}, "GetModel": {"id": "m_1", "status": "ready"}}
    api.events = [Event("model:loading", 1, {"task_id": "t", "progress": 5}), Event("model:ready", 2, {"task_id": "t"})]
    done = lensmesh("models", "load", "m_1", "--quantization", "int8", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"id": "m_1", "status": "ready"})
    assert api.calls[0] == ("LoadModel", {"id": "m_1", "quantization": "int8"})
    assert [rpc for rpc, _ in api.calls] == ["LoadModel", "WatchModel", "GetModel"]


def test_a_model_that_is_there_already_is_not_waited_for(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"LoadModel": {"status": "ready"}, "GetModel": {"id": "m_1"}}
    assert lensmesh("models", "load", "m_1").exit_code == 0
    assert [rpc for rpc, _ in api.calls] == ["LoadModel", "GetModel"]


def test_a_failed_load_is_one_line_and_a_status(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"LoadModel": {"status": "loading", "task_id": "t"}}
    failed = {"task_id": "t", "error_code": "MODEL_LOAD_FAILED", "error_message": "truncated"}
    api.events = [Event("model:failed", 1, failed)]
    done = lensmesh("models", "load", "m_1")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "lensmesh: MODEL_LOAD_FAILED: truncated"
    told = json.loads(lensmesh("models", "load", "m_1", "--json").stdout)
    assert told == {"error": {"code": "MODEL_LOAD_FAILED", "message": "truncated", "details": {}}}


def test_a_refusal_is_json_when_json_is_asked_for(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"GetModel": ApiError("MODEL_NOT_FOUND", "no such model", {"id": "m_1"})}
    done = lensmesh("models", "show", "m_1", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["details"] == {"id": "m_1"}


def test_lists_are_tables_or_the_whole_reply(api: FakeApi, lensmesh: Callable[..., Any]):
    reply = {"models": [{"id": "m_1", "name": "tiny", "status": "ready", "parameter_count": 7}], "total": 1}
    api.replies = {"ListModels": reply}
    assert json.loads(lensmesh("models", "list", "--json").stdout) == reply
    assert "tiny" in lensmesh("models", "list").stdout


def test_a_list_in_a_narrow_window_has_whole_ids(api: FakeApi, lensmesh: Callable[..., Any], monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    row = {"id": "m_tiny_gpt2_8968b69704a3e1ba", "name": "a name of words", "model_type": "gpt2", "status": "ready"}
    api.replies = {"ListModels": {"models": [row], "total": 1}}
    assert row["id"] in lensmesh("models", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (
            ("models", "create", "tiny", "--identifier", "tiny-gpt2", "--source", "local"),
            (
                "CreateModel",
                {
                    "name": "tiny",
                    "source": "local",
                    "model_identifier": "tiny-gpt2",
                    "quantization": "none",
                    "revision": "",
                },
            ),
        ),
        (("models", "delete", "m_1", "--cascade"), ("DeleteModel", {"id": "m_1", "cascade": True})),
        (("models", "unload", "m_1"), ("UnloadModel", {"id": "m_1"})),
        (
            ("models", "estimate", "m_1", "--quantization", "int4"),
            ("EstimateModel", {"id": "m_1", "quantization": "int4"}),
        ),
        (
            ("datasets", "create", "d", "--identifier", "x.jsonl", "--source", "local"),
            (
                "CreateDataset",
                {"name": "d", "source": "local", "identifier": "x.jsonl", "split": "train", "text_field": "text"},
            ),
        ),
        (
            ("datasets", "create", "d", "--identifier", "x.csv", "--prompt-field", "q", "--target-field", "a"),
            (
                "CreateDataset",
                {"name": "d", "source": "huggingface", "identifier": "x.csv", "split": "train", "text_field": "text"}
                | {"prompt_field": "q", "target_field": "a"},
            ),
        ),
        (("datasets", "show", "ds_1"), ("GetDataset", {"id": "ds_1"})),
        (("datasets", "delete", "ds_1"), ("DeleteDataset", {"id": "ds_1"})),
        (("jobs", "cancel", "job_1"), ("CancelJob", {"id": "job_1"})),
        (("train", "show", "job_1"), ("GetTrainingJob", {"id": "job_1"})),
        (("train", "pause", "job_1"), ("PauseTrainingJob", {"id": "job_1"})),
        (("train", "cancel", "job_1"), ("CancelTrainingJob", {"id": "job_1"})),
        (("train", "export", "job_1"), ("GetTrainingConfig", {"id": "job_1"})),
        (("jobs", "retry", "job_1"), ("RetryJob", {"id": "job_1"})),
        (("jobs", "show", "job_1"), ("GetJob", {"id": "job_1"})),
        (("groups", "create", "g", "--model", "m_1"), ("CreateGroup", {"name": "g", "model_id": "m_1"})),
        (("groups", "status", "grp_1"), ("GetGroupStatus", {"id": "grp_1"})),
        (
            ("groups", "attach", "grp_1", "--kind", "transcoder", "--transcoder", "tc_1"),
            ("AttachLens", {"group_id": "grp_1", "kind": "transcoder", "transcoder_id": "tc_1", "extension_id": ""}),
        ),
        (("groups", "detach", "grp_1", "lens_1"), ("DetachLens", {"group_id": "grp_1", "lens_id": "lens_1"})),
        (("groups", "switch", "grp_1", "lens_1"), ("SwitchLens", {"id": "grp_1", "lens_id": "lens_1"})),
        (("groups", "switch", "grp_1"), ("SwitchLens", {"id": "grp_1"})),
        (("groups", "preload", "grp_1"), ("PreloadGroup", {"id": "grp_1", "lens_ids": []})),
        (
            ("groups", "preload", "grp_1", "--lens", "a", "--parked"),
            ("PreloadGroup", {"id": "grp_1", "lens_ids": ["a"], "residency": "parked"}),
        ),
        (
            ("groups", "analyze", "grp_1", "hello", "--lens", "a", "--lens", "b"),
            ("AnalyzeText", {"id": "grp_1", "text": "hello", "lens_ids": ["a", "b"], "top_k": 5}),
        ),
        (("groups", "delete", "grp_1"), ("DeleteGroup", {"id": "grp_1"})),
        (
            ("extensions", "create", "m_1", "task", "--kind", "hybrid", "--rank", "4"),
            (
                "CreateExtension",
                {"model_id": "m_1", "task_name": "task", "kind": "hybrid", "lora": {"r": 4}, "layer": {}},
            ),
        ),
        (
            ("extensions", "create", "m_1", "task", "--kind", "layer"),
            ("CreateExtension", {"model_id": "m_1", "task_name": "task", "kind": "layer", "layer": {}}),
        ),
        (("extensions", "show", "x_1"), ("GetExtension", {"id": "x_1"})),
        (("extensions", "activate", "x_1"), ("ActivateExtension", {"id": "x_1"})),
        (("extensions", "deactivate", "x_1"), ("DeactivateExtension", {"id": "x_1"})),
        (("extensions", "evaluate", "x_1", "ds_1"), ("EvaluateExtension", {"id": "x_1", "dataset_id": "ds_1"})),
        (
            ("extensions", "generate", "x_1", "once", "--max-new-tokens", "3"),
            ("GenerateWithExtension", {"id": "x_1", "prompt": "once", "max_new_tokens": 3}),
        ),
        (("extensions", "delete", "x_1"), ("DeleteExtension", {"id": "x_1"})),
    ],
)
def test_what_a_command_asks_for(
    api: FakeApi, lensmesh: Callable[..., Any], arguments: tuple[str, ...], call: tuple[str, dict[str, Any]]
):
    assert lensmesh(*arguments, "--json").exit_code == 0
    assert api.calls == [call]


def test_pruning_only_shows_what_it_would_delete_until_it_is_told_to(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"PruneCheckpoints": {"kept": [], "deleted": [], "freed_bytes": 0}}
    assert lensmesh("train", "prune", "job_1").exit_code == 0
    assert lensmesh("train", "prune", "job_1", "--best", "1", "--every", "500", "--apply").exit_code == 0
    policy = {"best": 1, "every_tokens": 500}
    assert api.calls == [
        ("PruneCheckpoints", {"id": "job_1", "validate_only": True}),
        ("PruneCheckpoints", {"id": "job_1", "validate_only": False, "retention": policy}),
    ]


def test_a_configuration_is_exported_and_imported(api: FakeApi, lensmesh: Callable[..., Any], tmp_path: Path):
    config = {"model_id": "m_1", "layers": [1], "source": {"cache_id": "act_1"}, "seed": 7}
    api.replies = {
        "GetTrainingConfig": config,
        "CreateTrainingJob": {"id": "job_2"},
        "CloneTrainingJob": {"id": "job_3"},
    }
    file = tmp_path / "config.json"
    assert lensmesh("train", "export", "job_1", file).exit_code == 0
    assert lensmesh("train", "import", file, "--no-wait", "--json").exit_code == 0
    assert lensmesh("train", "clone", "job_1", "--no-wait", "--json").exit_code == 0
    assert api.calls[1:] == [
        ("CreateTrainingJob", config),
        ("GetTrainingJob", {"id": "job_2"}),
        ("CloneTrainingJob", {"id": "job_1"}),
        ("GetTrainingJob", {"id": "job_3"}),
    ]
    file.write_text("{")
    assert lensmesh("train", "import", file).exit_code == 2


def test_an_extraction_from_the_cache_is_not_waited_for(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {
        "ExtractActivations": {"extraction_id": "ext_1"},
        "GetExtraction": {"status": "completed", "reused": True, "job_id": "job_1"},
    }
    done = lensmesh("extract", "m_1", "ds_1", "--layers", "1,2", "--json")
    assert json.loads(done.stdout)["reused"]
    assert api.calls[0][1]["layer_indices"] == [1, 2]
    assert [rpc for rpc, _ in api.calls] == ["ExtractActivations", "GetExtraction"]


def test_a_text_is_read_with_changes_and_what_is_no_json_is_refused(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"AnalyzeText": {"readings": []}}
    zero = {"site": "mlp_out", "layer": 1, "op": "zero"}
    lensmesh("groups", "analyze", "grp_1", "hello", "--change", json.dumps(zero), "--change", json.dumps(zero))
    assert api.calls[0][1]["interventions"] == [zero, zero]
    refused = lensmesh("groups", "analyze", "grp_1", "hello", "--change", "zero")
    assert (refused.exit_code, len(api.calls)) == (2, 1)
    assert "--change" in refused.stderr


def test_how_a_dataset_is_cut_can_be_said(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"ExtractActivations": {"cache": "miss"}}
    plain = {"max_length": 0, "special_tokens": "tokenizer", "packing": False, "extension_id": ""}
    said = {"max_length": 64, "special_tokens": "bos", "packing": True, "extension_id": "x_1", "sample_count": 9}
    options = (
        "--max-length",
        "64",
        "--special-tokens",
        "bos",
        "--packing",
        "--extension",
        "x_1",
        "--sample-count",
        "9",
    )
    for given, expected in (((), plain), (options, said)):
        api.calls.clear()
        lensmesh("extract", "m_1", "ds_1", "--layers", "1", "--plan", "--json", *given)
        asked = api.calls[0][1]
        assert {name: asked[name] for name in expected} == expected
        assert ("sample_count" in asked) == bool(given)


def test_an_extraction_that_runs_is_followed(api: FakeApi, lensmesh: Callable[..., Any]):
    running, done = {"status": "queued", "job_id": "job_1"}, {"status": "completed", "job_id": "job_1"}
    api.replies = {"ExtractActivations": {"extraction_id": "ext_1"}, "GetExtraction": [running, done]}
    api.events = [Event("extraction:completed", 1, {})]
    assert json.loads(lensmesh("extract", "m_1", "ds_1", "--layers", "1", "--json").stdout) == done
    assert ("WatchJob", {"id": "job_1", "after_sequence": 0}) in api.calls


def test_a_training_is_followed_and_shown(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"CreateTrainingJob": {"id": "job_1"}, "GetTrainingJob": {"transcoder_ids": ["tc_1"]}}
    api.events = [Event("training:progress", 1, {"progress": 50, "fvu": 0.2}), Event("training:completed", 2, {})]
    done = lensmesh("train", "m_1", "--layers", "2", "--cache", "c", "--group-sizes", "1,2", "--top-k", "8", "--json")
    assert json.loads(done.stdout) == {"transcoder_ids": ["tc_1"]}
    asked = api.calls[0][1]
    assert (asked["source"], asked["group_sizes"], asked["top_k"]) == ({"cache_id": "c"}, [1, 2], 8)


def test_a_live_training_of_a_split_model_is_asked_for(api: FakeApi, lensmesh: Callable[..., Any]):
    api.replies = {"CreateTrainingJob": {"id": "job_1"}}
    api.events = [Event("training:completed", 1, {})]
    asked = ("--dataset", "ds_1", "--live", "--split", "--devices", "2", "--tracker", "trackio")
    assert lensmesh("train", "m_1", "--layers", "2", *asked, "--json").exit_code == 0
    fields = api.calls[0][1]
    assert fields["source"] == {"dataset_id": "ds_1", "live": True, "split": True}
    assert (fields["devices"], fields["tracker"]) == (2, "trackio")


def test_both_sites_are_trained_and_judged_side_by_side(api: FakeApi, lensmesh: Callable[..., Any]):
    queued = [{"transcoder_id": f"tc_{n}", "job_id": f"job_{n}", "evaluation_id": f"eval_{n}"} for n in (1, 2)]
    evaluations = [{"transcoder_id": f"tc_{n}", "fvu": n / 10} for n in (1, 2)]
    api.replies = {
        "CreateTrainingJob": {"id": "job_0"},
        "GetTrainingJob": {"transcoder_ids": ["tc_1", "tc_2"]},
        "CompareTranscoders": {"compared": queued},
        "GetEvaluations": {"evaluations": evaluations},
        "GetTranscoder": [{"source_hook_point": "mlp"}, {"source_hook_point": "resid"}],
    }
    api.events = [Event("training:completed", 1, {})]
    done = lensmesh("train", "sites", "m_1", "--layers", "2", "--dataset", "ds_1", "--held-out", "ds_2", "--json")
    found = json.loads(done.stdout)["evaluations"]
    assert [(one["source_hook_point"], one["fvu"]) for one in found] == [("mlp", 0.1), ("resid", 0.2)]
    asked = dict(api.calls)
    assert asked["CreateTrainingJob"]["source_site"] == "mlp_in"
    assert asked["CreateTrainingJob"]["variants"] == [{"source_site": "resid_mid"}]
    assert asked["CompareTranscoders"] == {"transcoder_ids": ["tc_1", "tc_2"], "dataset_id": "ds_2"}


def test_the_evaluation_that_was_asked_for_is_shown(api: FakeApi, lensmesh: Callable[..., Any]):
    evaluations = [{"job_id": "other", "fvu": 0.9}, {"job_id": "job_1", "fvu": 0.1}]
    api.replies = {"EvaluateTranscoder": {"job_id": "job_1"}, "ListEvaluations": {"evaluations": evaluations}}
    api.events = [Event("evaluation:completed", 1, {})]
    assert json.loads(lensmesh("evaluate", "tc_1", "ds_1", "--devices", "2", "--json").stdout)["fvu"] == 0.1
    assert api.calls[0][1]["devices"] == 2


def test_numbers_that_are_none_are_refused(api: FakeApi, lensmesh: Callable[..., Any]):
    done = lensmesh("extract", "m_1", "ds_1", "--layers", "one")
    assert done.exit_code == 2
    assert "whole numbers" in done.stderr
    assert api.calls == []


def test_without_a_mesh_the_way_out_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, lensmesh: Callable[..., Any]
):
    monkeypatch.setenv("LENSMESH_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("LENSMESH_GATEWAY", raising=False)
    done = lensmesh("models", "list")
    assert done.exit_code == 1
    assert "run `lensmesh up`" in done.stderr
    for command in (("token",), ("migrate", "status")):
        monkeypatch.delenv("LENSMESH_DATABASE_URL", raising=False)
        done = lensmesh(*command)
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1


def test_a_token_carries_only_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, lensmesh: Callable[..., Any]
):
    monkeypatch.setenv("LENSMESH_STATE_DIR", str(tmp_path))
    assert lensmesh("keys").exit_code == 0
    token = json.loads(lensmesh("token", "--scope", "model:read", "--json").stdout)["token"]
    assert token.count(".") == 2
    assert lensmesh("token", "--scope", "root").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "rpc", "fields"),
    [
        (("extractions", "list", "--model", "m_1"), "ListExtractions", {"model_id": "m_1"}),
        (("extractions", "pause", "ext_1"), "PauseExtraction", {"id": "ext_1"}),
        (("extractions", "resume", "ext_1", "--no-wait"), "ResumeExtraction", {"id": "ext_1"}),
        (("extractions", "cancel", "ext_1"), "CancelExtraction", {"id": "ext_1"}),
        (("caches", "show", "act_1"), "GetActivationCache", {"id": "act_1"}),
        (("caches", "delete", "act_1"), "DeleteActivationCache", {"id": "act_1"}),
    ],
)
def test_extractions_and_caches(
    api: FakeApi, lensmesh: Callable[..., Any], arguments: tuple[str, ...], rpc: str, fields: dict[str, Any]
):
    api.replies = {"ListExtractions": {"extractions": []}}
    assert rpc in ROUTES
    assert lensmesh(*arguments, "--json").exit_code == 0
    assert api.calls == [(rpc, fields)]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_a_damaged_cache_fails_the_command(api: FakeApi, lensmesh: Callable[..., Any], ok: bool, code: int):
    api.replies = {"VerifyActivationCache": {"id": "act_1", "ok": ok}}
    assert lensmesh("caches", "verify", "act_1", "--json").exit_code == code
