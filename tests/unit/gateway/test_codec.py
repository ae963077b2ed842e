from __future__ import annotations

import json
import math
import struct
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.body import MAX_DEPTH, parse
from gateway.decode import decode
from gateway.encode import dumps, encode, prune
from services.kit.errors import Invalid, TooLarge
from tests.unit.gateway import zoo_stubs

pb = zoo_stubs.module("zoo.v1.zoo_pb2")
TEXT = st.text(max_size=20)
DOUBLES = st.floats(allow_nan=False)
TIMES = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
DURATIONS = st.timedeltas(timedelta(days=-100000), timedelta(days=100000))
JSON = st.recursive(
    st.none() | st.booleans() | TEXT | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def signed(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@st.composite
def everything(draw: st.DrawFn, depth: int = 2) -> Message:
    """Any message of every kind of field, built with protobuf alone."""
    inner = st.builds(pb.Everything.Inner, number=signed(64), shade=st.integers(0, 1))
    made = pb.Everything(
        int32_field=draw(signed(32)),
        int64_field=draw(signed(64)),
        uint32_field=draw(st.integers(0, 2**32 - 1)),
        uint64_field=draw(st.integers(0, 2**64 - 1)),
        sint64_field=draw(signed(64)),
        fixed64_field=draw(st.integers(0, 2**64 - 1)),
        float_field=draw(st.floats(width=32, allow_nan=False)),
        double_field=draw(DOUBLES),
        bool_field=draw(st.booleans()),
        string_field=draw(TEXT),
        bytes_field=draw(st.binary(max_size=20)),
        kind=draw(st.integers(0, 2)),
        doubles=draw(st.lists(DOUBLES, max_size=3)),
        kinds=draw(st.lists(st.integers(0, 2), max_size=3)),
        blobs=draw(st.lists(st.binary(max_size=5), max_size=3)),
        by_name=draw(st.dictionaries(TEXT, signed(64), max_size=3)),
        by_number=draw(st.dictionaries(signed(32), TEXT, max_size=3)),
        by_truth=draw(st.dictionaries(st.booleans(), inner, max_size=2)),
        inners=draw(st.lists(inner, max_size=3)),
    )
    if draw(st.booleans()):
        made.optional_int64, made.optional_kind, made.optional_string = draw(signed(64)), draw(st.integers(0, 2)), ""
    if draw(st.booleans()):
        made.at.FromDatetime(draw(TIMES))
        made.lasting.FromTimedelta(draw(DURATIONS))
        made.mask.paths.extend(draw(st.lists(st.sampled_from(["a", "a.b", "c_d"]), max_size=3)))
    if draw(st.booleans()):
        made.structure.update(draw(st.dictionaries(TEXT, JSON, max_size=3)))
        decode(made.value, draw(JSON))
    if draw(st.booleans()):
        made.nothing.SetInParent()
        made.inner.CopyFrom(draw(inner))
    if draw(st.booleans()):
        made.first = draw(TEXT)
    elif draw(st.booleans()):
        made.second.CopyFrom(draw(inner))
    if depth and draw(st.booleans()):
        made.itself.CopyFrom(draw(everything(depth=depth - 1)))
    return made


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(everything())
def test_proto_to_json_to_proto_is_the_identity(message: Message) -> None:
    again = pb.Everything()
    decode(again, json.loads(dumps(encode(message))))
    assert again == message


@given(JSON)
def test_json_to_value_to_json_is_the_identity(value: Any) -> None:
    message = pb.Everything()
    decode(message, {"value": value})
    assert message.HasField("value")
    assert json.loads(dumps(encode(message)))["value"] == value


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float_is_written_with_the_fewest_digits(value: float) -> None:
    written = encode(pb.Everything(float_field=value))["float_field"]
    assert struct.pack("<f", written) == struct.pack("<f", value)
    digits = len(Decimal(repr(written)).normalize().as_tuple().digits)
    assert digits <= 6 or struct.pack("<f", float(f"{value:.{digits - 1}g}")) != struct.pack("<f", value)


def test_the_json_conventions() -> None:
    message = pb.Everything(
        int64_field=2**60, kind=pb.KIND_BIG_DOG, double_field=3.0, float_field=0.1, bytes_field=b"\xff"
    )
    message.at.FromJsonString("2025-10-06T10:00:00Z")
    message.lasting.FromJsonString("1.5s")
    made = encode(message)
    assert made["int64_field"] == 2**60
    assert made["kind"] == "big_dog"
    assert repr(made["double_field"]) == "3"
    assert made["float_field"] == 0.1
    assert made["bytes_field"] == "/w=="
    assert made["at"] == "2025-10-06T10:00:00Z"
    assert made["lasting"] == "1.500s"
    always = {name: made[name] for name in ("doubles", "by_name", "string_field", "bool_field")}
    assert always == {"doubles": [], "by_name": {}, "string_field": "", "bool_field": False}
    assert {"optional_int64", "optional_kind", "inner", "value", "first", "second"}.isdisjoint(made)
    assert "kind" not in encode(pb.Everything())


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_numbers_that_json_lacks_are_words(value: float, word: str) -> None:
    made = encode(pb.Everything(double_field=value))
    assert made["double_field"] == word
    again = pb.Everything()
    decode(again, {"double_field": word})
    assert struct.pack("<d", again.double_field) == struct.pack("<d", value)


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        ({"nmae": 1}, "nmae", "not a field"),
        ({"stringField": "x"}, "stringField", "not a field"),
        ({"inner": {"x": 1}}, "inner.x", "not a field"),
        ({"inners": [{}, {"number": "x"}]}, "inners[1].number", "whole number"),
        ({"inners": {}}, "inners", "a list"),
        ({"inners": [None]}, "inners[0]", "an object"),
        ({"inner": []}, "inner", "an object"),
        ({"int32_field": 2**31}, "int32_field", "between"),
        ({"int32_field": 1.5}, "int32_field", "whole number"),
        ({"int32_field": True}, "int32_field", "whole number"),
        ({"uint64_field": -1}, "uint64_field", "between"),
        ({"int64_field": 10**40}, "int64_field", "between"),
        ({"double_field": 10**400}, "double_field", "too large"),
        ({"double_field": "1"}, "double_field", "a number"),
        ({"double_field": False}, "double_field", "a number"),
        ({"float_field": 1e39}, "float_field", "too large"),
        ({"bool_field": "true"}, "bool_field", "true or false"),
        ({"bool_field": 1}, "bool_field", "true or false"),
        ({"string_field": 1}, "string_field", "a string"),
        ({"string_field": "\ud800"}, "string_field", "surrogate"),
        ({"bytes_field": "a*b="}, "bytes_field", "base64"),
        ({"kind": "CAT"}, "kind", "one of cat, big_dog"),
        ({"kind": "KIND_CAT"}, "kind", "one of"),
        ({"kind": 1}, "kind", "one of"),
        ({"kinds": ["cat", "cow"]}, "kinds[1]", "one of"),
        ({"at": "yesterday"}, "at", "timestamp"),
        ({"at": 5}, "at", "a string"),
        ({"lasting": "5 minutes"}, "lasting", "duration"),
        ({"mask": ["a"]}, "mask", "commas"),
        ({"structure": []}, "structure", "an object"),
        ({"value": 10**400}, "value", "too large"),
        ({"by_name": []}, "by_name", "an object"),
        ({"by_name": {"a": None}}, "by_name[a]", "whole number"),
        ({"by_number": {"x": "1"}}, "by_number[x]", "whole number"),
        ({"by_truth": {"yes": {}}}, "by_truth[yes]", "true or false"),
        ({"first": "x", "second": {}}, "second", "excludes first"),
        ({"nothing": {"x": 1}}, "nothing.x", "not a field"),
        ([], "body", "an object"),
        ("x", "body", "an object"),
        (None, "body", "an object"),
    ],
)
def test_a_wrong_field_is_named(value: Any, field: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        decode(pb.Everything(), value)
    (violation,) = caught.value.violations
    assert violation[0] == field
    assert said in violation[1]


def test_all_wrong_fields_are_named_together() -> None:
    with pytest.raises(Invalid) as caught:
        decode(pb.Everything(), {"a": 1, "kind": "cow", "inner": {"b": 2}})
    assert [field for field, _ in caught.value.violations] == ["a", "kind", "inner.b"]


def test_a_flood_of_wrong_fields_is_cut() -> None:
    with pytest.raises(Invalid) as caught:
        decode(pb.Everything(), {f"x{number}": 1 for number in range(100_000)})
    assert len(caught.value.violations) == 20
    assert len(caught.value.message) < 2000


def test_null_means_unset() -> None:
    message = pb.SwitchRequest()
    decode(message, {"id": None, "lens_id": None})
    assert message == pb.SwitchRequest()
    assert not message.HasField("lens_id")
    both = pb.Everything()
    decode(both, {"first": None, "second": {}})
    assert both.WhichOneof("choice") == "second"


def test_integers_may_come_as_text_or_as_whole_floats() -> None:
    message = pb.Everything()
    decode(message, {"int64_field": "-9007199254740993", "int32_field": 3.0})
    assert (message.int64_field, message.int32_field) == (-9007199254740993, 3)


@pytest.mark.parametrize("key", ["itself", "value", "structure"])
def test_depth_is_limited(key: str) -> None:
    def nested(levels: int) -> Any:
        value: Any = {} if key != "structure" else {"x": {}}
        for _ in range(levels):
            value = {"itself": value} if key == "itself" else {"x": value}
        return value if key == "itself" else {key: value}

    decode(pb.Everything(), nested(MAX_DEPTH - 2))
    with pytest.raises(TooLarge):
        decode(pb.Everything(), nested(MAX_DEPTH + 2))


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_deep_body_is_refused_before_it_is_walked(data: bytes) -> None:
    with pytest.raises(TooLarge):
        parse(data)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"{", "body"),
        (b"\xff\xfe", "body"),
        (b'{"a": NaN}', "body"),
        (b'{"a": -Infinity}', "body"),
        (b'{"a": 1, "a": 2}', "a"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "body"),
        (b"{} x", "body"),
    ],
)
def test_a_body_that_is_not_json_is_refused(data: bytes, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(data)
    assert caught.value.violations[0][0] == field


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_an_error_of_ours(data: bytes) -> None:
    try:
        decode(pb.Everything(), parse(data))
    except (Invalid, TooLarge) as error:
        error.message.encode("utf-8")


@given(JSON)
def test_any_json_is_a_message_or_an_error_of_ours(value: Any) -> None:
    for name in pb.Everything.DESCRIPTOR.fields_by_name:
        named: list[str] = []
        try:
            decode(pb.Everything(), {name: value})
        except Invalid as error:
            named = [field for field, _ in error.violations]
        assert all(field.startswith(name) for field in named)


def test_prune_keeps_what_a_mask_names() -> None:
    value = {"a": 1, "b": {"c": 2, "d": 3}, "e": [{"f": 1, "g": 2}]}
    assert prune(value, ["a", "b.c", "e.f", "zzz"]) == {"a": 1, "b": {"c": 2}, "e": [{"f": 1}]}
    assert prune(value, ["b", "b.c"]) == {"b": {"c": 2, "d": 3}}
