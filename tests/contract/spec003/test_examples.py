"""Every JSON example of the model management document (its section 5 and appendix E), against a running mesh."""

from __future__ import annotations

import pytest

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
