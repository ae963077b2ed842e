from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from services.client import api as client_api
from services.client.api import ApiError, Event, follow_job, follow_load
from services.client.progress import describe_progress, wait_for_job


class Scripted:
    """An Api whose streams are scripted: each watch plays the next list; an exception in it is raised there."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = list(streams)
        self.after: list[int] = []

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        raise AssertionError(f"{rpc} is not expected")

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        self.after.append(fields["after_sequence"])
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_api, "_PAUSE_SECONDS", 0.0)


def event(sequence: int, name: str = "training:progress", **data: Any) -> Event:
    return Event(name, sequence, data)


GONE = ApiError("UNREACHABLE", "gone")
DONE = event(3, "training:completed")


def test_a_lost_connection_goes_on_after_the_last_event():
    api = Scripted([event(1), GONE], [event(1), event(2), GONE], [DONE])
    assert [one.sequence for one in follow_job(api, "job_1")] == [1, 2, 3]
    assert api.after == [0, 1, 2]


def test_a_stream_that_ends_without_a_terminal_event_is_opened_again():
    api = Scripted([event(1)], [event(2), DONE, event(4)])
    assert [one.sequence for one in follow_job(api, "job_1")] == [1, 2, 3]


def test_a_stream_that_reaches_its_deadline_is_opened_again():
    api = Scripted([event(1), ApiError("DEADLINE_EXCEEDED", "late")], [DONE])
    assert [one.sequence for one in follow_job(api, "job_1")] == [1, 3]


def test_a_refusal_is_not_retried():
    api = Scripted([ApiError("NOT_FOUND", "no such job")], [DONE])
    with pytest.raises(ApiError, match="NOT_FOUND"):
        list(follow_job(api, "job_1"))


def test_a_mesh_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_api, "_PATIENCE_SECONDS", -1.0)
    with pytest.raises(ApiError, match="UNREACHABLE"):
        list(follow_job(Scripted([GONE], [DONE]), "job_1"))


def test_a_load_ignores_the_events_of_other_loads():
    api = Scripted(
        [
            event(1, "model:ready", task_id="old"),
            event(2, "model:loading", task_id="new", progress=50),
            event(3, "model:unloaded", task_id="other"),
            event(4, "model:ready", task_id="new"),
            event(5, "model:unloaded", task_id="new"),
        ]
    )
    assert [one.sequence for one in follow_load(api, "m_1", "new")] == [2, 4]


@pytest.mark.parametrize("name", ["training:failed", "training:cancelled"])
def test_a_job_that_does_not_complete_is_an_error(name: str):
    failed = event(2, name, error_code="NON_FINITE_LOSS", error_message="loss is nan")
    with pytest.raises(ApiError, match="NON_FINITE_LOSS: loss is nan"):
        wait_for_job(Scripted([event(1, progress=10), failed]), "job_1", "train", Console(quiet=True))


def test_the_last_event_of_a_job_that_completes_is_returned():
    assert wait_for_job(Scripted([event(1), DONE]), "job_1", "train", Console(quiet=True)) is DONE


def test_the_bar_shows_what_people_follow():
    data = {"fvu": 0.1389, "loss": 2.5, "tokens_per_second": 12345.6, "progress": 10}
    assert describe_progress(data) == "FVU 0.139  loss 2.500  12,346 tokens/s"
    assert describe_progress({"samples_processed": 5, "total_samples": 10}) == "5/10 samples"
    assert describe_progress({"waiting_for": "device"}) == "waits for device"
