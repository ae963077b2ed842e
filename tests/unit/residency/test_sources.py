"""Local identifiers stay below the roots; hub models come through huggingface_hub from an endpoint of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.residency.checkpoint import CheckpointError, PickleRefused, read_headers
from services.residency.loading import load_model
from services.residency.sources import Source, SourceNotFound, SourceUnavailable, digest, fetch, find_local, inspect
from services.residency.splice import logits
from tests import models
from tests.hub import Hub, serving_hub


@pytest.mark.parametrize(
    "identifier",
    ["", ".", "..", "../a/m", "a/../../b", "/etc", "a\0b", "a\\m", "a%2fm", "x" * 501, "missing", "a/m/config.json"],
)
def test_identifiers_that_name_no_directory_below_a_root(tmp_path, identifier):
    (tmp_path / "a" / "m").mkdir(parents=True)
    (tmp_path / "a" / "m" / "config.json").write_text("{}")
    with pytest.raises(SourceNotFound) as caught:
        find_local(identifier, [tmp_path])
    assert str(tmp_path) not in str(caught.value)


def test_only_plain_relative_names_are_looked_up_even_inside_a_root(tmp_path):
    (tmp_path / "a" / "m").mkdir(parents=True)
    assert find_local("a/m", [tmp_path]) == (tmp_path / "a" / "m").resolve()
    for identifier in (str(tmp_path / "a" / "m"), "a/../a/m"):
        with pytest.raises(SourceNotFound):
            find_local(identifier, [tmp_path])


def test_a_symbolic_link_may_not_lead_out_of_the_root(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceNotFound):
        find_local("link", [tmp_path / "root"])


def test_roots_are_looked_up_in_order_and_dots_in_names_are_fine(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "mistralai" / "Mistral-7B-v0.1").mkdir(parents=True)
    (tmp_path / "two" / "only").mkdir()
    roots = [tmp_path / "one", tmp_path / "two"]
    assert find_local("mistralai/Mistral-7B-v0.1", roots) == (roots[0] / "mistralai/Mistral-7B-v0.1").resolve()
    assert find_local("only", roots) == (roots[1] / "only").resolve()


def test_the_digest_follows_content_and_not_names_of_directories(tmp_path):
    one, two = models.copied(tmp_path / "a", "gpt2"), models.copied(tmp_path / "b", "gpt2")
    assert digest(one) == digest(two)
    file = two / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert digest(one) != digest(two)
    (one / "config.json").write_text((one / "config.json").read_text() + " ")
    assert digest(one) != digest(two)


def test_a_directory_without_a_config_cannot_be_inspected(tmp_path):
    path = models.copied(tmp_path, "gpt2")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect(Source("local", "gpt2"), [tmp_path], tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with serving_hub(models.copied(tmp_path / "served", "gpt2"), monkeypatch) as hub:
        yield hub


def test_a_hub_model_is_downloaded_without_its_pickles_and_loads(hub, tmp_path):
    (hub.files / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.files / "evil.py").write_text("")
    path = fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
    assert {file.name for file in path.iterdir()} & {"pytorch_model.bin", "evil.py"} == set()
    expected = logits(models.tiny("gpt2"), models.batch())
    assert torch.equal(logits(load_model(path, "none"), models.batch()), expected)


def test_a_download_tells_its_bytes_and_ends_when_nobody_wants_it_any_more(hub, tmp_path):
    class GivenUp(Exception):
        pass

    def give_up(done: int, total: int) -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache", give_up)
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    told: list[tuple[int, int]] = []
    fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache", lambda *step: told.append(step))
    assert told == sorted(told)
    size = sum(file.stat().st_size for file in hub.files.iterdir())
    assert told[-1][0] == told[-1][1] <= size
    assert told[-1][1] >= (hub.files / "model.safetensors").stat().st_size
    told.clear()
    fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache", lambda *step: told.append(step))
    assert told == []


def test_a_hub_model_is_inspected_without_downloading_its_weights(hub, tmp_path):
    found = inspect(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
    assert found.config["model_type"] == "gpt2"
    local = {entry.name: (entry.shape, entry.dtype, entry.nbytes) for entry in read_headers(hub.files)}
    assert {entry.name: (entry.shape, entry.dtype, entry.nbytes) for entry in found.entries} == local
    assert found.digest == ""
    weights = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert weights < (hub.files / "model.safetensors").stat().st_size


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(SourceNotFound):
        fetch(Source("huggingface", "org/other"), [], tmp_path / "cache")


def test_a_downloaded_model_needs_no_hub(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    path = fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache") == path
    found = inspect(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
    assert (found.entries, found.digest) == (read_headers(path), digest(path))


def test_a_hub_model_of_pickles_is_refused_with_the_way_out(hub, tmp_path):
    (hub.files / "model.safetensors").rename(hub.files / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match=r"safetensors.*save_pretrained"):
        inspect(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
    assert not any("pytorch_model.bin" in asked for asked in hub.asked)


def test_a_hub_model_of_a_dtype_that_nobody_reads_is_refused_by_its_tensor(hub, tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (hub.files / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="'w' is stored as F4"):
        inspect(Source("huggingface", "org/tiny"), [], tmp_path / "cache")


def test_a_hub_that_breaks_off_is_a_passing_failure(hub, tmp_path):
    hub.breaks_off = True
    with pytest.raises(SourceUnavailable):
        inspect(Source("huggingface", "org/tiny"), [], tmp_path / "cache")


def test_a_hub_that_does_not_answer_is_a_passing_failure(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable):
        fetch(Source("huggingface", "org/tiny"), [], tmp_path / "cache")
