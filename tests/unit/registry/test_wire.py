"""Domain objects to protos and back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import groups_pb2, jobs_pb2, models_pb2

from services.registry.wire import plain, to_dict, to_json, to_message, word

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass
class Row:
    id: str = "m_1"
    quantization: str = "int8"
    status: str = "ready"
    progress: float = 50.0
    hidden_size: int | None = 64
    vocab_size: int | None = None
    created_at: datetime = AT
    loaded_at: datetime | None = None


def test_words_times_and_absent_fields() -> None:
    message = to_message(models_pb2.Model, Row(), config={"layers": 2}, perplexities=[{"loss": 1.5}])
    assert (message.quantization, message.status) == (types_pb2.QUANTIZATION_INT8, models_pb2.MODEL_STATUS_READY)
    assert message.created_at.ToDatetime(tzinfo=UTC) == AT
    assert (message.HasField("vocab_size"), message.HasField("loaded_at"), message.hidden_size) == (False, False, 64)
    assert (message.config["layers"], message.perplexities[0].loss) == (2, 1.5)


def test_back_again() -> None:
    fields = to_dict(to_message(models_pb2.Model, Row(), config={"layers": 2, "eps": 0.5}))
    assert (fields["quantization"], fields["status"], fields["created_at"]) == ("int8", "ready", AT)
    assert (fields["vocab_size"], fields["hidden_size"], fields["loaded_at"]) == (None, 64, None)
    assert fields["config"] == {"layers": 2, "eps": 0.5}
    assert isinstance(fields["config"]["layers"], int)
    assert to_dict(models_pb2.UpdateModelRequest(id="m")) == {
        "id": "m",
        "name": None,
        "quantization": None,
        "pinned": None,
        "preload": None,
        "etag": "",
    }


def test_an_unspecified_enum_is_empty_and_a_nested_prefix_is_known() -> None:
    assert to_dict(groups_pb2.Lens())["residency"] == ""
    enum = types_pb2.InterventionSpec.DESCRIPTOR.enum_types_by_name["Op"]
    assert word(enum, types_pb2.InterventionSpec.OP_REPLACE) == "replace"


def test_json_has_iso_times_and_no_absent_fields() -> None:
    job = to_message(jobs_pb2.Job, {"id": "job_1", "status": "running", "created_at": AT, "detail": {"n": 1}})
    shown = to_json(job)
    assert (shown["status"], shown["created_at"], shown["detail"]) == ("running", "2026-01-02T03:04:05Z", {"n": 1})
    assert "finished_at" not in shown
    assert "error_code" not in shown


def test_integers_survive_protobufs_floats() -> None:
    assert plain({"a": [1.0, 2.5, {"b": 3.0}], "c": "x"}) == {"a": [1, 2.5, {"b": 3}], "c": "x"}
    assert isinstance(plain(1e300), float)
