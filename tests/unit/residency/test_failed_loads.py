"""A load that fails, at whatever stage, leaves memory and disk as they were; the next one succeeds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, PretrainedConfig, Qwen2Config

from services.kit import errors
from services.residency import disk_cache, estimate, loading, resident, sources
from services.residency.disk_cache import DiskCache
from services.residency.pool import Pool
from services.residency.quantize import resident_bytes
from tests import models

OOM = RuntimeError("CUDA error: out of memory")
STAGES: dict[str, tuple[Any, str, Exception, str]] = {
    "config and headers": (loading, "prepare", OSError(5, "Input/output error"), "MODEL_LOAD_FAILED"),
    "estimate": (estimate, "laid_out", loading.LoadFailed("a shape differs"), "MODEL_LOAD_FAILED"),
    "a tensor is read": (loading, "read_tensors", OSError(5, "Input/output error"), "MODEL_LOAD_FAILED"),
    "a tensor is quantised": (loading, "replace_linear", OOM, "DEVICE_OOM"),
    "weights are tied": (loading, "_require_complete", loading.LoadFailed("a tensor is missing"), "MODEL_LOAD_FAILED"),
    "the digest": (sources, "digest", OSError(5, "Input/output error"), "MODEL_LOAD_FAILED"),
    "the cache is looked up": (DiskCache, "find", OSError(5, "Input/output error"), "MODEL_LOAD_FAILED"),
    "the tokenizer": (resident, "load_tokenizer", loading.LoadFailed("not valid"), "MODEL_LOAD_FAILED"),
    "the first forward": (resident, "fingerprint", MemoryError(), "DEVICE_OOM"),
}
CACHED = ("the digest", "the tokenizer", "the first forward")
"""Stages after which what was quantised may be kept: it is whole, and of these very files."""


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("stage", STAGES)
async def test_memory_and_disk_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    source = models.saved("gpt2")
    digest = sources.digest(source)
    pool = Pool("cpu", 1 << 30, disk_cache=DiskCache(tmp_path / "quantized", tmp_path / "hub", 1 << 30))
    kept = await pool.load("other", models.saved("llama"), "none")
    made: list[weakref.ref[Any]] = []
    skeleton = loading.skeleton

    def remembered(*args: Any) -> Any:
        made.append(weakref.ref(model := skeleton(*args)))
        return model

    owner, name, error, reason = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(loading, "skeleton", remembered)
        patch.setattr(owner, name, failing(error))
        with pytest.raises(errors.LensmeshError) as caught:
            await pool.load("m", source, "int8", expected_digest=digest)
    assert caught.value.reason == reason
    gc.collect()
    assert [model() for model in made] == [None] * len(made)
    assert (pool.used_bytes, pool.reserved_bytes, pool.residents) == (kept.nbytes, 0, [kept])
    assert sorted(files(tmp_path)) == (["blake3", "weights.safetensors"] if stage in CACHED else [])
    resident = await pool.load("m", source, "int8", expected_digest=digest)
    assert resident.nbytes == resident_bytes(resident.base.model)
    await pool.close()


async def test_a_disk_without_room_costs_the_cache_and_not_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool("cpu", 1 << 30, disk_cache=DiskCache(tmp_path / "quantized", tmp_path / "hub", 1 << 30))
    monkeypatch.setattr(disk_cache, "save_file", failing(OSError(28, "No space left on device")))
    await pool.load("m", models.saved("gpt2"), "int8", expected_digest=sources.digest(models.saved("gpt2")))
    assert list((tmp_path / "quantized").iterdir()) == []
    await pool.close()


@pytest.mark.parametrize("quantization", ["none", "int8"])
async def test_another_family_is_loaded_where_a_known_layout_is_its_own(tmp_path: Path, quantization: str) -> None:
    pool = Pool("cpu", 1 << 30)
    resident = await pool.load("m", unknown(tmp_path, Qwen2Config), quantization)
    family = resident.base.family
    assert family is not None
    assert (family.name, family.experimental) == ("qwen2", True)
    await pool.close()


async def test_another_family_that_only_looks_like_a_known_one_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    pool = Pool("cpu", 1 << 30)  # OLMo 2 norms what its MLP gives, under a name that is the norm before it in Llama
    with pytest.raises(errors.LensmeshError, match=r"'olmo2'.*no layout of their own.*layer 0 adds") as caught:
        await pool.load("m", unknown(tmp_path, Olmo2Config), "none")
    assert (caught.value.reason, caught.value.transient) == ("MODEL_LOAD_FAILED", False)
    assert (pool.used_bytes, pool.reserved_bytes, pool.residents) == (0, 0, [])
    await pool.close()


def unknown(folder: Path, config: type[PretrainedConfig]) -> Path:
    """A tiny model of a family that has no layout here."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(
            folder
        )
    models.tokenizer().save_pretrained(folder)
    return folder


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise type(error)(*error.args)  # a new one each time, for its traceback keeps the model alive

    return fail
