from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import template

SEGMENT = st.text(min_size=1, max_size=20).filter(lambda text: text not in (".", ".."))


def match(text: str, path: str) -> dict[str, str] | None:
    return template.parse(text).match(path.split("/")[1:])


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("/api/models", "/api/models", {}),
        ("/api/models", "/api/models/", None),
        ("/api/models", "/api/model", None),
        ("/api/models/{id}", "/api/models/m_1", {"id": "m_1"}),
        ("/api/models/{id}", "/api/models/", None),
        ("/api/models/{id}", "/api/models/a/b", None),
        ("/api/models/{id}", "/api/%6Dodels/a%2Fb%20c", {"id": "a/b c"}),
        ("/api/v2/groups/{id}/switch", "/api/v2/groups/g/switch", {"id": "g"}),
        ("/api/v2/groups/{id}/switch", "/api/v2/groups/g/preload", None),
        ("/api/{a.b}/x/{c}", "/api/1/x/2", {"a.b": "1", "c": "2"}),
        ("/v1/{name=models/*}", "/v1/models/m", {"name": "models/m"}),
        ("/v1/{name=models/*}", "/v1/groups/m", None),
        ("/v1/{name=models/*}:load", "/v1/models/m:load", {"name": "models/m"}),
        ("/v1/{name=models/*}:load", "/v1/models/m", None),
        ("/v1/{id}:load", "/v1/a:b:load", {"id": "a:b"}),
        ("/v1/{rest=**}", "/v1/a/b/c", {"rest": "a/b/c"}),
        ("/v1/{rest=**}", "/v1", None),
        ("/devices/{id=**}/clear", "/devices/host/cuda:0/clear", {"id": "host/cuda:0"}),
        ("/devices/{id=**}/clear", "/devices/host%2Fcuda%3A0/clear", {"id": "host/cuda:0"}),
        ("/devices/{id=**}/clear", "/devices/clear", None),
        ("/devices/{id=**}/clear", "/devices//clear", None),
        ("/a/{x=**}/b/{y}", "/a/1/2/b/3", {"x": "1/2", "y": "3"}),
    ],
)
def test_match(text: str, path: str, expected: dict[str, str] | None) -> None:
    assert match(text, path) == expected


@pytest.mark.parametrize(
    "text", ["", "/", "api", "/a//b", "/a/", "/{A}", "/{a=}", "/{a=b{c}}", "/a b", "/{a", "/a}", "/**/{b=**}", "/é"]
)
def test_a_wrong_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="path template"):
        template.parse(text)


@given(SEGMENT, SEGMENT)
def test_a_variable_is_what_was_quoted(first: str, second: str) -> None:
    path = f"/api/{quote(first, safe='')}/x/{quote(second, safe='')}"
    assert match("/api/{a}/x/{b}", path) == {"a": first, "b": second}


def test_a_path_that_is_not_utf8_is_an_error() -> None:
    with pytest.raises(UnicodeDecodeError):
        match("/api/{a}", "/api/%ff")


def test_precedence_prefers_verbs_then_literals() -> None:
    texts = ["/v1/{id=**}", "/v1/{id}", "/v1/models", "/v1/{id}:load"]
    ordered = sorted((template.parse(text) for text in texts), key=lambda one: one.precedence)
    assert [one.text for one in ordered] == ["/v1/{id}:load", "/v1/models", "/v1/{id}", "/v1/{id=**}"]


def test_templates_of_one_shape_match_the_same_paths() -> None:
    assert template.parse("/a/{x}/b").shape == template.parse("/a/{y=*}/b").shape != template.parse("/a/{x}/c").shape
