from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import query
from gateway.decode import refuse
from services.kit.errors import Invalid
from tests.unit.gateway import zoo_stubs

pb = zoo_stubs.module("zoo.v1.zoo_pb2")


def filled(text: str, message: object = None, variables: dict[str, str] | None = None, body: str = "") -> object:
    message = message if message is not None else pb.ListAnimalsRequest()
    query.fill(message, variables or {}, text.encode(), body=body)
    return message


def test_nested_repeated_and_well_known_parameters() -> None:
    made = filled(
        "filter.kind=big_dog&filter.born_after=2025-10-06T10%3A00%3A00Z&filter.heavier_than=1.5e2"
        "&tags=a&tags=b%20c&numbers=1&numbers=-2&limit=7&tame=false&read_mask=name,kind"
    )
    assert made.filter.kind == pb.KIND_BIG_DOG
    assert made.filter.born_after.ToJsonString() == "2025-10-06T10:00:00Z"
    assert made.filter.heavier_than == 150
    assert list(made.tags) == ["a", "b c"]
    assert list(made.numbers) == [1, -2]
    assert (made.limit, made.tame, made.HasField("tame")) == (7, False, True)
    assert list(made.read_mask.paths) == ["name", "kind"]


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("nope=1", "nope", "not a parameter"),
        ("filter=x", "filter", "not a parameter"),
        ("filter.nope=x", "filter.nope", "not a parameter"),
        ("tags.x=1", "tags.x", "not a parameter"),
        ("labels=x", "labels", "not a parameter"),
        ("labels.a=x", "labels.a", "not a parameter"),
        ("limit.x=1", "limit.x", "not a parameter"),
        ("limit=1&limit=2", "limit", "twice"),
        ("limit=ten", "limit", "whole number"),
        ("limit=1.0", "limit", "whole number"),
        ("limit=", "limit", "whole number"),
        ("limit=99999999999", "limit", "between"),
        ("tame=yes", "tame", "true or false"),
        ("tame", "tame", "true or false"),
        ("filter.kind=cow", "filter.kind", "one of cat, big_dog"),
        ("filter.heavier_than=1.2.3", "filter.heavier_than", "a number"),
        ("filter.heavier_than=1e999", "filter.heavier_than", "too large"),
        ("filter.born_after=now", "filter.born_after", "timestamp"),
        ("numbers=1&numbers=x", "numbers", "whole number"),
        ("tags=%ff", "query", "UTF-8"),
        ("&".join(["tags=a"] * 201), "query", "200"),
    ],
)
def test_a_wrong_parameter_is_named(text: str, field: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        filled(text)
    (violation,) = caught.value.violations
    assert violation[0] == field
    assert said in violation[1]


def test_a_parameter_of_the_body_or_the_path_is_refused() -> None:
    with pytest.raises(Invalid, match="belongs into the body"):
        filled("lens_id=x", pb.SwitchRequest(), body="*")
    with pytest.raises(Invalid, match="belongs into the body"):
        filled("animal.name=x", pb.UpdateAnimalRequest(), body="animal")
    with pytest.raises(Invalid, match="stands in the path"):
        filled("id=x", pb.GetAnimalRequest(), {"id": "y"})
    made = filled("reason=x", pb.UpdateAnimalRequest(), {"animal.id": "7"}, body="animal")
    assert (made.reason, made.animal.id) == ("x", "7")


def test_a_body_may_repeat_the_path_but_not_contradict_it() -> None:
    assert filled("", pb.SwitchRequest(id="g"), {"id": "g"}, body="*").id == "g"
    with pytest.raises(Invalid, match="differs from the one in the path"):
        filled("", pb.SwitchRequest(id="h"), {"id": "g"}, body="*")


@given(st.text(max_size=100))
def test_any_query_is_a_message_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(Invalid):
        filled(text)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_parameter_is_set_or_named(name: str, text: str) -> None:
    wrong: list[tuple[str, str]] = []
    query.put(pb.ListAnimalsRequest(), name, [text], wrong)
    if wrong:
        with pytest.raises(Invalid):
            refuse(wrong)
