"""Quantised weights on the disk: the same bits as quantising gives, never half, never harmed, within the limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download

from services.residency import loading
from services.residency.disk_cache import DiskCache
from services.residency.pool import Pool
from services.residency.quantize import tensors_of
from services.residency.sources import digest
from tests import models

GB = 1_000_000_000


def cache(folder: Path, limit: int = GB) -> DiskCache:
    return DiskCache(folder / "quantized", folder / "hub", limit)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5"])
def test_a_second_load_has_the_bits_of_the_first(tmp_path: Path, family: str, quantization: str) -> None:
    directory = models.saved(family)
    first = loading.load_model(directory, quantization)
    assert cache(tmp_path).keep(first, "d", quantization, "cpu")
    kept = cache(tmp_path).find("d", quantization, "cpu")
    told: list[tuple[int, int]] = []
    prepared = loading.prepare(directory, quantization)
    second = loading.fill(prepared, "cpu", lambda done, total: told.append((done, total)), kept)
    assert told[-1][0] == told[-1][1] > 0
    ours, theirs = tensors_of(second), tensors_of(first)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.inference_mode():
        inputs = {"input_ids": models.batch()} | ({"decoder_input_ids": models.batch()} if family == "t5" else {})
        assert torch.equal(second(**inputs).logits, first(**inputs).logits)
    assert cache(tmp_path).find("d", "int4" if quantization == "int8" else "int8", "cpu") is None


async def test_the_pool_quantises_once_and_again_when_the_file_is_harmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = models.saved("llama")
    known = digest(directory)
    quantised: list[str] = []
    replace = loading.replace_linear

    def counted(model: torch.nn.Module, path: str, *rest: torch.Tensor, **more: object) -> None:
        quantised.append(path)
        replace(model, path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "replace_linear", counted)
    pool = Pool("cpu", GB, disk_cache=cache(tmp_path))
    prints = []
    for harm in (False, False, True):
        if harm:
            file = next((tmp_path / "quantized").glob("*/weights.safetensors"))
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        quantised.clear()
        resident = await pool.load("m", directory, "int8", expected_digest=known)
        prints.append((bool(quantised), resident.fingerprint))
        await pool.unload("m")
    await pool.close()
    assert [did for did, _ in prints] == [True, False, True]
    assert len({fingerprint for _, fingerprint in prints}) == 1


def test_the_least_recently_used_leaves_first_downloads_included(tmp_path: Path) -> None:
    model = loading.load_model(models.saved("gpt2"), "int8")
    roomy = cache(tmp_path)
    for age, name in ((300, "old"), (100, "new")):
        assert roomy.keep(model, name, "int8", "cpu")
        entry = next((tmp_path / "quantized").glob(f"{name}-*"))
        os.utime(entry, (os.stat(entry).st_atime, os.stat(entry).st_mtime - age))
    size = sum(file.stat().st_size for file in entry.iterdir())
    blob = hub_model(tmp_path / "hub", size, age=200)
    assert cache(tmp_path, 2 * size).trim() == size
    assert roomy.find("old", "int8", "cpu") is None
    assert blob.exists()
    assert cache(tmp_path, size).trim() == size
    assert not blob.exists()
    assert roomy.find("new", "int8", "cpu") is not None


def test_a_download_that_is_about_to_be_read_stays_and_was_used_last(tmp_path: Path) -> None:
    model = loading.load_model(models.saved("gpt2"), "int8")
    assert cache(tmp_path).keep(model, "new", "int8", "cpu")
    size = sum(file.stat().st_size for file in next((tmp_path / "quantized").iterdir()).iterdir())
    blob = hub_model(tmp_path / "hub", size, age=200)
    (snapshot,) = (tmp_path / "hub").glob("*/snapshots/*")
    cache(tmp_path, size // 2).use(snapshot)
    assert blob.exists()
    assert cache(tmp_path).find("new", "int8", "cpu") is None
    assert cache(tmp_path).keep(model, "next", "int8", "cpu")
    entry = next((tmp_path / "quantized").glob("next-*"))
    os.utime(entry, (os.stat(entry).st_atime, os.stat(entry).st_mtime - 100))
    cache(tmp_path, size + 100).trim()
    assert (blob.exists(), entry.exists()) == (True, False)


def test_a_model_is_forgotten_alone(tmp_path: Path) -> None:
    model = loading.load_model(models.saved("gpt2"), "int8")
    kept = cache(tmp_path)
    for name in ("one", "two"):
        assert kept.keep(model, name, "int8", "cpu")
    blob = hub_model(tmp_path / "hub", 1000, age=0)
    assert kept.forget("one", "other/model") > 0
    assert (kept.find("one", "int8", "cpu"), blob.exists()) == (None, True)
    assert kept.find("two", "int8", "cpu") is not None
    assert kept.forget("", "o/m") == 1000
    assert not blob.exists()
    assert kept.find("two", "int8", "cpu") is not None


def hub_model(hub: Path, size: int, age: float) -> Path:
    """A downloaded model as the hub's own library lays it out."""
    commit = "0" * 40
    repository = hub / "models--o--m"
    blob = repository / "blobs" / "b"
    snapshot = repository / "snapshots" / commit
    for folder in (blob.parent, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(bytes(size))
    (snapshot / "model.safetensors").symlink_to(blob)
    (repository / "blobs" / "c").touch()
    (snapshot / "config.json").symlink_to(repository / "blobs" / "c")
    (repository / "refs" / "main").write_text(commit)
    used = blob.stat().st_mtime - age
    for each in blob.parent.iterdir():
        os.utime(each, (used, used))
    assert Path(snapshot_download("o/m", cache_dir=hub, local_files_only=True)) == snapshot
    return blob


def test_what_does_not_fit_the_limit_is_not_kept(tmp_path: Path) -> None:
    model = loading.load_model(models.saved("gpt2"), "int8")
    assert not cache(tmp_path, 10_000).keep(model, "d", "int8", "cpu")
    assert not list((tmp_path / "quantized").glob("*"))
