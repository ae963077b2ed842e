"""Tiny models on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import models


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with models.one_thread():
        yield
