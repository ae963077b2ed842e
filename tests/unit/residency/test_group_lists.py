"""The test lists of spec/000 and spec/001, one named test each, on the pool that holds a group.

What spec/001 adds for edge cases is tested over gRPC: corrupt lenses and other layer counts in `wire/test_residency`,
memory that runs short in `wire/test_registry_shared_devices`, concurrent switches in `wire/test_registry_groups`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.kit import errors
from services.residency import checkpoint, loading
from services.residency.lenses import Spec, tuned_lens
from services.residency.pool import Pool
from services.residency.quantize import tensors_of
from services.residency.reading import activations, on_device
from tests import models

LENS = 4 * models.WIDTH * (models.WIDTH + 1)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool("cpu", 1 << 30, 1 << 30)
    yield made
    await made.close()


def lens(folder: Path, number: int, **more: Any) -> Spec:
    """A tuned lens that differs from the others."""
    weight = torch.eye(models.WIDTH) * number
    tuned_lens.save(folder / str(number), {0: (weight, torch.zeros(models.WIDTH))})
    return Spec(f"lens-{number}", "tuned_lens", folder / str(number), **more)


async def read(pool: Pool, model_id: str, lens_id: str, source: str = "") -> list[tuple[int, float]]:
    """What the lens predicts after the first layer."""
    async with pool.lease(source or model_id) as lease:
        base, attached = lease.record.base, pool.get(model_id).lenses[lens_id].lens
        ids = on_device(models.batch(1, 8)[0].tolist(), base)
        seen = await pool.run(activations, base, [attached], ids)
        found = await pool.run(attached.read, seen, ids, 3, 0)
    return [(p.token_id, p.probability) for p in found.tokens[-1].layers[0][1]]


async def test_the_second_member_reads_its_own_bytes_and_not_the_bases(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """\"Second load is much faster\": bytes read from the disk, because seconds depend on the machine."""
    done: list[int] = []
    original = checkpoint.read_tensors

    def counted(directory: Path, entries: Any, on_bytes: Any) -> Any:
        done.append(sum(entry.nbytes for entry in entries))
        return original(directory, entries, on_bytes)

    for module in (loading, tuned_lens):
        monkeypatch.setattr(module, "read_tensors", counted)
    base = await pool.load("m", models.saved("gpt2"), "none")
    await pool.attach("m", lens(tmp_path, 1))
    await pool.attach("m", lens(tmp_path, 2))
    assert done[1:] == [LENS, LENS]
    assert done[0] > 20 * LENS
    assert base.nbytes >= done[0]


async def test_memory_does_not_double_with_the_second_member(pool: Pool, tmp_path: Path) -> None:
    base = await pool.load("m", models.saved("gpt2"), "none")
    await pool.attach("m", lens(tmp_path, 1))
    await pool.attach("m", lens(tmp_path, 2))
    assert pool.used_bytes == base.nbytes + 2 * LENS


async def test_both_members_work_and_differ(pool: Pool, tmp_path: Path) -> None:
    await pool.load("m", models.saved("gpt2"), "none")
    first, second = lens(tmp_path, 1), lens(tmp_path, 2)
    await pool.attach("m", first)
    alone = await read(pool, "m", "lens-1")
    await pool.attach("m", second)
    assert await read(pool, "m", "lens-1") == alone
    assert await read(pool, "m", "lens-2") != alone


async def test_a_group_goes_to_host_memory_whole_and_comes_back_whole(pool: Pool, tmp_path: Path) -> None:
    await pool.load("m", models.saved("gpt2"), "none")
    for number in (1, 2):
        await pool.attach("m", lens(tmp_path, number))
    await pool.switch("m", "lens-2")
    before = [await read(pool, "m", f"lens-{number}") for number in (1, 2)]
    size = pool.used_bytes
    pool.park_bytes = size - 1
    with pytest.raises(errors.Exhausted):
        await pool.park("m")
    pool.park_bytes = size
    assert await pool.park("m") == size
    assert (pool.used_bytes, pool.parked_bytes) == (0, size)
    await pool.load("n", models.saved("llama"), "none")
    back = await pool.restore("m")
    assert (back.active, pool.parked_bytes) == ("lens-2", 0)
    assert [await read(pool, "m", f"lens-{number}") for number in (1, 2)] == before
    assert {tensor.device.type for tensor in tensors_of(back.base.model).values()} == {"cpu"}


async def test_members_with_different_sources_share_base_and_sources(pool: Pool, tmp_path: Path) -> None:
    """Two members read one source, a third the base: three models would be five without sharing."""
    await pool.load("m", models.saved("gpt2"), "none")
    other = models.copied(tmp_path, "gpt2", seed=1)
    await pool.load("source", other, "none")
    for number in (1, 2):
        await pool.attach("m", lens(tmp_path / "lenses", number, source_model_id="source"))
    await pool.attach("m", lens(tmp_path / "lenses", 3))
    assert pool.used_bytes == 2 * pool.get("m").nbytes + 3 * LENS
    assert await read(pool, "m", "lens-1", "source") != await read(pool, "m", "lens-1")
    await pool.unload("source")
    with pytest.raises(errors.Conflict):
        await read(pool, "m", "lens-1", "source")
    await read(pool, "m", "lens-3")


async def test_rapid_switching_ends_at_the_last_one_and_costs_nothing(pool: Pool, tmp_path: Path) -> None:
    await pool.load("m", models.saved("gpt2"), "none")
    for number in (1, 2):
        await pool.attach("m", lens(tmp_path, number))
    before = pool.used_bytes
    turns = [f"lens-{1 + turn % 2}" for turn in range(100)]
    await asyncio.gather(*(pool.switch("m", name) for name in turns))
    resident = pool.get("m")
    assert (resident.active, resident.leases, pool.used_bytes) == (turns[-1], 0, before)


async def test_a_lens_that_does_not_fit_a_nearly_full_device_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    await pool.load("m", models.saved("gpt2"), "none")
    await pool.attach("m", lens(tmp_path, 1))
    before = await read(pool, "m", "lens-1")
    pool.budget_bytes = pool.used_bytes + LENS - 1
    with pytest.raises(errors.Exhausted) as caught:
        await pool.attach("m", lens(tmp_path, 2))
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert list(pool.get("m").lenses) == ["lens-1"]
    assert await read(pool, "m", "lens-1") == before
    pool.budget_bytes += 1
    await pool.attach("m", lens(tmp_path, 2))
    assert pool.used_bytes == pool.budget_bytes
