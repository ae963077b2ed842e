"""Digests of datasets agree with what the services that read them compute."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from services.registry.adapters.files import RootedDatasets
from services.residency.texts import DatasetRecord, content_digest


@pytest.mark.parametrize("identifier", ["one.txt", "many"])
async def test_the_same_content_has_the_same_digest_everywhere(tmp_path: Path, identifier: str) -> None:
    (tmp_path / "many" / "deep").mkdir(parents=True)
    (tmp_path / "one.txt").write_text("hello")
    (tmp_path / "many" / "a.txt").write_text("a")
    (tmp_path / "many" / "deep" / "b.txt").write_text("b")
    size, digest = await RootedDatasets([tmp_path]).measure(identifier)
    record = DatasetRecord(id="ds", source="local", identifier=identifier)
    assert (size, digest) == ({"one.txt": 5, "many": 2}[identifier], content_digest(record, [tmp_path]))


async def test_the_first_root_that_has_it_wins(tmp_path: Path) -> None:
    for name, text in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "both.txt").write_text(text)
    (tmp_path / "second" / "only.txt").write_text("22")
    files = RootedDatasets([tmp_path / "first", tmp_path / "second"])
    assert (await files.measure("only.txt"))[0] == 2
    expected = blake3(b".\0" + blake3(b"1").digest()).hexdigest()
    assert await files.measure("both.txt") == (1, expected)
