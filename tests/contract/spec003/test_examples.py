"""Every JSON example of the model management document (its section 5 and appendix E), against a running mesh."""

from __future__ import annotations

import json

import pytest
from websockets.sync.client import connect

from tests.contract.spec003.conftest import EXAMPLES, Played
from tests.contract.spec003.shapes import differences

REPLIES = [name for name, example in EXAMPLES.items() if "response" in example]
EVENTS = [name for name, example in EXAMPLES.items() if "event" in example]


@pytest.mark.parametrize("name", REPLIES)
def test_reply(played: Played, name: str) -> None:
    answer, example = played.answers[name], EXAMPLES[name]
    assert answer.status_code == example["status"], answer.text
    assert answer.headers["content-type"] == "application/json"
    assert differences(example["response"], answer.json()) == []


@pytest.mark.parametrize("name", EVENTS)
def test_event(played: Played, name: str) -> None:
    told = played.events[name]
    assert [differences(EXAMPLES[name]["event"], data) for data in told] == [[]] * len(told)


def test_a_watch_resumes_after_a_sequence(played: Played) -> None:
    model_id = played.answers["create_model"].json()["id"]
    told = [data for name, events in played.events.items() if name.startswith("model:") for data in events]
    missed = [data["sequence"] for data in sorted(told, key=lambda data: data["sequence"])][5:]
    address = str(played.client.base_url).replace("http", "ws").rstrip("/")
    with connect(f"{address}/api/events", proxy=None) as socket:
        wish = {"token": played.token, "topics": [f"model:{model_id}"], "after": {model_id: missed[0] - 1}}
        socket.send(json.dumps(wish))
        again = [json.loads(socket.recv(timeout=30))["data"]["sequence"] for _ in missed]
    assert again == missed == list(range(missed[0], missed[-1] + 1))


def test_a_job_s_events_are_sse_that_resumes(played: Played) -> None:
    extraction = played.answers["get_extraction"].json()
    path = f"/api/jobs/{extraction['job_id']}/events"
    whole = played.client.get(path, headers={"accept": "text/event-stream"}).text
    ids = [line.removeprefix("id: ") for line in whole.splitlines() if line.startswith("id: ")]
    assert ids == [str(number) for number in range(1, len(ids) + 1)]
    assert "event: extraction:completed" in whole
    rest = played.client.get(path, headers={"last-event-id": ids[-3]}).text
    assert [line.removeprefix("id: ") for line in rest.splitlines() if line.startswith("id: ")] == ids[-2:]


def test_a_shard_comes_whole_and_in_ranges(played: Played) -> None:
    path = f"/api/activation-caches/{played.answers['get_extraction'].json()['cache_id']}/shards/0"
    whole = played.client.get(path)
    assert (whole.status_code, whole.headers["content-length"]) == (200, str(len(whole.content)))
    header = int.from_bytes(whole.content[:8], "little")
    assert json.loads(whole.content[8 : 8 + header])
    part = played.client.get(path, headers={"range": f"bytes=8-{8 + header - 1}"})
    assert (part.status_code, part.content) == (206, whole.content[8 : 8 + header])
    assert part.headers["content-range"] == f"bytes 8-{8 + header - 1}/{len(whole.content)}"
    behind = played.client.get(path, headers={"range": f"bytes={len(whole.content)}-"})
    assert (behind.status_code, behind.json()["error"]["code"]) == (416, "RANGE_NOT_SATISFIABLE")
