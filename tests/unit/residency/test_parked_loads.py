"""Models that are loaded into host memory at once, on a CPU and beside another device, as `cpu:0` is to the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from services.kit import errors
from services.residency.lenses import Spec
from services.residency.pool import Pool
from services.residency.splice import logits
from tests import models
from tests.unit.residency.test_pool_of_extensions import folder

GIB = 1 << 30


BOTH = pytest.mark.parametrize("pool", ["cpu", "cpu:0"], indirect=True)


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    made = Pool(getattr(request, "param", "cpu:0"), GIB, GIB)
    yield made
    await made.close()


@BOTH
async def test_it_takes_nothing_of_the_device_and_computes_the_same_once_restored(pool: Pool) -> None:
    await pool.load("m", models.saved("gpt2"), "none")
    async with pool.lease("m") as lease:
        print_, before = lease.record.fingerprint, await lease.run(logits, lease.model, models.batch())
    await pool.unload("m")
    resident = await pool.load("m", models.saved("gpt2"), "none", parked=True)
    assert (resident.state, pool.used_bytes, pool.reserved_bytes) == ("parked", 0, 0)
    assert pool.parked_bytes == resident.nbytes > 0
    assert resident.fingerprint == (print_ if pool.device == "cpu" else "")
    with pytest.raises(errors.Conflict, match="parked"):
        await pool.lease("m").__aenter__()
    await pool.restore("m")
    assert (pool.used_bytes, pool.parked_bytes) == (resident.nbytes, 0)
    async with pool.lease("m") as lease:
        assert lease.record.fingerprint == print_
        assert torch.equal(await lease.run(logits, lease.model, models.batch()), before)


async def test_a_fingerprint_that_is_known_holds_for_it_too(pool: Pool) -> None:
    with pytest.raises(errors.Failed) as caught:
        await pool.load("m", models.saved("gpt2"), "none", expected_fingerprint="other", parked=True)
        await pool.restore("m")
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert (pool.used_bytes, pool.parked_bytes, pool.residents) == (0, 0, [])


async def test_its_lenses_come_to_host_memory_and_are_whole_once_restored(pool: Pool, tmp_path: Path) -> None:
    resident = await pool.load("m", models.saved("llama", 2), "none", parked=True)
    attached = await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "x", 1)), parked=True)
    await pool.attach("m", Spec("l", "logit_lens"), parked=True)
    assert (pool.used_bytes, pool.parked_bytes) == (0, resident.nbytes + attached.nbytes)
    await pool.restore("m")
    await pool.switch("m", "x")
    print_ = attached.fingerprint
    assert print_ not in ("", resident.fingerprint)
    await pool.park("m")
    await pool.restore("m")
    assert attached.fingerprint == print_


async def test_what_may_be_parked_limits_it(pool: Pool, tmp_path: Path) -> None:
    size = (await pool.load("m", models.saved("llama", 2), "none", parked=True)).nbytes
    pool.park_bytes = 2 * size - 1
    with pytest.raises(errors.Exhausted) as caught:
        await pool.load("n", models.saved("llama", 2), "none", parked=True)
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert (pool.parked_bytes, pool.reserved_bytes, len(pool.residents)) == (size, 0, 1)
    pool.park_bytes = size
    with pytest.raises(errors.Exhausted):
        await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "x", 1)), parked=True)
    assert (pool.parked_bytes, pool.get("m").lenses) == (size, {})


@BOTH
async def test_only_a_cpu_quantises_in_host_memory(pool: Pool) -> None:
    if pool.device == "cpu":
        assert (await pool.load("m", models.saved("llama"), "int8", parked=True)).state == "parked"
        await pool.restore("m")
    else:
        with pytest.raises(errors.Unsupported):
            await pool.load("m", models.saved("llama"), "int8", parked=True)
        assert pool.residents == []
