"""On a GPU: a model of 7 B parameters loads quantised within a minute and within 6 GB, and moves without a trace."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from services.kit import errors
from services.residency.disk_cache import DiskCache
from services.residency.kernels import BITSANDBYTES, kernel_of
from services.residency.lenses import Spec, tuned_lens
from services.residency.loading import skeleton
from services.residency.memory import held, survey
from services.residency.pool import Pool
from services.residency.sensors import Sensors, sources
from tests import models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda:0"
GB = 1_000_000_000
LAYERS = 32


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's shape in bfloat16, random and layer by layer: 13.5 GB on the disk, one layer in memory."""
    folder = tmp_path_factory.mktemp("seven")
    if psutil.disk_usage(str(folder)).free < 40 * GB:
        pytest.skip("needs 40 GB of disk")
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in skeleton(config, torch.bfloat16).named_parameters()}
    index: dict[str, str] = {}
    for layer in range(-1, LAYERS):
        mine = [name for name in shapes if f".layers.{layer}." in name or (layer < 0 and ".layers." not in name)]
        file = f"model-{layer + 1:05d}.safetensors"
        tensors = {name: torch.randn(shapes[name], device=DEVICE).mul_(0.02).bfloat16().cpu() for name in mine}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    made = Pool(DEVICE, 40 * GB, 40 * GB, DiskCache(tmp_path / "quantized", tmp_path / "hub", 40 * GB))
    yield made
    await made.close()


@pytest.mark.parametrize(("quantization", "most"), [("int8", 7.5 * GB), ("int4", 4.5 * GB)])
async def test_seven_billion_parameters_load_quantised_within_a_minute(
    pool: Pool, seven: Path, quantization: str, most: float
) -> None:
    assert kernel_of(quantization, DEVICE) == BITSANDBYTES
    torch.cuda.reset_peak_memory_stats()
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    resident = await pool.load("m", seven, quantization)
    seconds = time.perf_counter() - start
    assert seconds < 60
    assert resident.nbytes < most
    assert torch.cuda.memory_allocated() == pytest.approx(resident.nbytes, rel=0.02)
    assert psutil.Process().memory_info().rss - before < 2 * GB


async def test_a_budget_of_6_gb_is_kept(pool: Pool, seven: Path) -> None:
    pool.budget_bytes = 6 * GB
    with pytest.raises(errors.Exhausted) as caught:
        await pool.load("m", seven, "int8")
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert torch.cuda.memory_allocated() < GB // 10
    torch.cuda.reset_peak_memory_stats()
    await pool.load("m", seven, "int4")
    assert torch.cuda.max_memory_allocated() <= 6 * GB


@pytest.mark.parametrize("quantization", ["none", "fp16", "bf16", "int8", "int4"])
async def test_park_and_restore_keep_every_bit_and_give_the_device_back(pool: Pool, quantization: str) -> None:
    resident = await pool.load("m", models.saved("llama"), quantization)
    await pool.attach("m", Spec("l", "logit_lens"))
    print_ = resident.fingerprint
    for _ in range(3):
        await pool.park("m")
        assert torch.cuda.memory_allocated() == 0
        restored = await pool.restore("m")
        assert restored.fingerprint == print_
    await pool.unload("m")
    assert (torch.cuda.memory_allocated(), held(DEVICE)) == (0, 0)


async def test_a_lens_that_is_parked_alone_gives_the_device_its_bytes_back(pool: Pool, tmp_path: Path) -> None:
    resident = await pool.load("m", models.saved("llama"), "bf16")
    tuned_lens.save(tmp_path, {0: (torch.eye(models.WIDTH), torch.zeros(models.WIDTH))})
    before = torch.cuda.memory_allocated(DEVICE)
    spec = Spec("l", "tuned_lens", tmp_path)
    size = (await pool.attach("m", spec)).nbytes
    assert torch.cuda.memory_allocated(DEVICE) >= before + size
    assert await pool.detach("m", "l", park=True) == size
    assert torch.cuda.memory_allocated(DEVICE) == before
    assert (pool.used_bytes, pool.parked_bytes) == (resident.nbytes, size)
    await pool.attach("m", spec)
    assert torch.cuda.memory_allocated(DEVICE) >= before + size


async def test_a_model_that_comes_parked_touches_the_device_only_when_it_is_restored(pool: Pool) -> None:
    print_ = (await pool.load("m", models.saved("llama"), "bf16")).fingerprint
    await pool.unload("m")
    await pool.load("m", models.saved("llama"), "bf16", parked=True)
    await pool.attach("m", Spec("l", "logit_lens"), parked=True)
    assert torch.cuda.memory_allocated() == 0
    assert (await pool.restore("m")).fingerprint == print_
    await pool.unload("m")
    assert (torch.cuda.memory_allocated(), held(DEVICE)) == (0, 0)


async def test_running_out_of_memory_leaves_the_pool_and_the_device_as_they_were(pool: Pool) -> None:
    kept = await pool.load("other", models.saved("gpt2"), "none")
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / survey(DEVICE, 0).total_bytes)
    try:
        with pytest.raises(errors.Exhausted) as caught:
            await pool.run(lambda: torch.empty(8 * GB, dtype=torch.uint8, device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.reason == "DEVICE_OOM"
    assert (torch.cuda.memory_allocated(), pool.residents) == (before, [kept])


def test_the_sensors_tell_of_this_device() -> None:
    found = Sensors(sources(DEVICE, shared=survey(DEVICE, 0).shared)).look()
    assert 0 <= found.utilization_ratio <= 1
    assert found.used_bytes > 0
    assert 0 < found.temperature_celsius < 110
