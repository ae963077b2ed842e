"""What an identifier may be, before any path is joined."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.errors import Invalid
from services.registry.identifiers import check_dataset_identifier, check_identifier


@pytest.mark.parametrize("identifier", ["gpt2", "mistralai/Mistral-7B-v0.1", "a.b/c..d", "x_1-y"])
def test_dots_within_a_name_are_fine(identifier: str) -> None:
    check_identifier("huggingface", identifier)
    check_identifier("local", identifier)


@pytest.mark.parametrize(
    "identifier", ["", ".", "..", "../a", "a/..", "a/../b", "/a", "a/", "a//b", "a\\b", "a%2fb", "a\0", "ä", "a" * 501]
)
@pytest.mark.parametrize("source", ["local", "huggingface", "custom"])
def test_what_could_leave_a_root_is_refused_and_the_field_named(source: str, identifier: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_identifier(source, identifier)
    assert refusal.value.violations[0][0] == "model_identifier"
    with pytest.raises(Invalid) as other:
        check_dataset_identifier(source, identifier)
    assert other.value.violations[0][0] == "identifier"


def test_deep_paths_are_local_only() -> None:
    check_identifier("local", "a/b/c")
    with pytest.raises(Invalid):
        check_identifier("huggingface", "a/b/c")


@given(st.text(max_size=40))
def test_whatever_passes_stays_below_any_root(identifier: str) -> None:
    import posixpath

    try:
        check_identifier("local", identifier)
    except Invalid:
        return
    joined = posixpath.normpath(posixpath.join("/root/models", identifier))
    assert joined.startswith("/root/models/")
