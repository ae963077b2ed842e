"""The tokenizer of a model is found without its weights, among the files that are here anyway."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import normalizers

from services.extraction.adapters.tokenizers import Tokenizers
from services.extraction.domain import BaseModel
from services.kit import errors
from tests import models

MODEL = BaseModel("m_1", "gpt2", "gpt2", "", "d1", "none", {}, 4, models.WIDTH, models.CONTEXT, 1, 8)
HUB = replace(MODEL, identifier="org/name", source="huggingface")
TEXT = models.TEXTS[1]


class Pool:
    """Of these models, by id."""

    def __init__(self, **residents: Any) -> None:
        self._residents = residents

    def get(self, model_id: str) -> Any:
        if model_id not in self._residents:
            raise errors.Conflict("it is not here")
        return self._residents[model_id]


def tokenizers(folder: Path, **residents: Any) -> Tokenizers:
    pool: Any = Pool(**residents)
    return Tokenizers(pool, [folder / "models"], folder / "hub")


def snapshot(folder: Path, revision: str) -> Path:
    """What a download leaves of a hub model at its default branch."""
    cached = folder / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True, exist_ok=True)
    (cached / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(models.saved("gpt2"), cached / "snapshots" / revision))


def test_a_loaded_models_own_is_taken(tmp_path: Path) -> None:
    resident = SimpleNamespace(tokenizer=models.tokenizer())
    assert tokenizers(tmp_path, m_1=resident).find(MODEL) is resident.tokenizer


def test_a_local_models_is_read_once_and_again_when_its_files_change(tmp_path: Path) -> None:
    folder = models.copied(tmp_path / "models", "gpt2")
    found = tokenizers(tmp_path)
    first, digest = found.find(MODEL), found.digest(found.find(MODEL))
    assert first(TEXT)["input_ids"] == models.tokenizer()(TEXT)["input_ids"]
    assert found.find(replace(MODEL, digest="d2")) is first
    changed = models.tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    changed.save_pretrained(folder)
    assert found.find(MODEL)(TEXT)["input_ids"] == changed(TEXT)["input_ids"] != first(TEXT)["input_ids"]
    assert found.digest(found.find(MODEL)) != digest
    shutil.rmtree(folder)
    assert found.find(MODEL) is None
    assert found.digest(found.find(MODEL)) == ""


def test_a_hub_models_is_read_where_it_was_downloaded_and_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    found = tokenizers(tmp_path)
    assert found.find(HUB) is None
    folder = snapshot(tmp_path, "a" * 40)
    assert found.find(HUB)(TEXT)["input_ids"] == models.tokenizer()(TEXT)["input_ids"]
    assert found.find(replace(HUB, digest="d3", revision="b" * 40)) is None
    (folder / "tokenizer.json").write_text("damaged")
    assert found.find(HUB) is None
