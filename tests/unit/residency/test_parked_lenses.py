"""Lenses that are parked in host memory alone, on a CPU and beside another device, as `cpu:0` is to the pool."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from services.kit import errors
from services.residency.fingerprint import fingerprint
from services.residency.lenses import Spec, tuned_lens
from services.residency.lenses.extension import Extension
from services.residency.pool import Pool
from services.residency.quantize import tensors_of
from services.residency.splice import logits
from tests import models
from tests.unit.residency.test_pool_of_extensions import folder

GIB = 1 << 30


BOTH = pytest.mark.parametrize("pool", ["cpu", "cpu:0"], indirect=True)


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    made = Pool(getattr(request, "param", "cpu:0"), GIB, GIB)
    await made.load("m", models.saved("llama", 2), "none")
    yield made
    await made.close()


def tuned(path: Path) -> Spec:
    tuned_lens.save(path, {0: (torch.eye(models.WIDTH), torch.zeros(models.WIDTH))})
    return Spec("t", "tuned_lens", path)


async def read(pool: Pool, lens_id: str) -> torch.Tensor:
    async with pool.lease("m", lens_id) as lease:
        return await lease.run(logits, lease.model, models.batch())


@BOTH
async def test_a_lens_leaves_alone_and_comes_back_without_its_files(pool: Pool, tmp_path: Path) -> None:
    base = pool.used_bytes
    spec, other = tuned(tmp_path / "t"), Spec("x", "extension", folder=folder(tmp_path / "x", 1))
    kept = [(await pool.attach("m", each)).nbytes for each in (spec, other)]
    print_, before = pool.get("m").lenses["x"].fingerprint, await read(pool, "x")
    await pool.switch("m", "x")
    for each, size in zip((spec, other), kept, strict=True):
        assert await pool.detach("m", each.lens_id, park=True) == size > 0
        assert await pool.detach("m", each.lens_id, park=True) == 0
    assert (pool.used_bytes, pool.parked_bytes, pool.get("m").active) == (base, sum(kept), None)
    with pytest.raises(errors.NotFound):
        await pool.switch("m", "t")
    with pytest.raises(errors.NotFound):
        await read(pool, "x")
    for each in (spec, other):
        assert each.folder is not None
        shutil.rmtree(each.folder)
        await pool.attach("m", each)
    assert (pool.used_bytes, pool.parked_bytes) == (base + sum(kept), 0)
    assert pool.get("m").lenses["x"].fingerprint == print_
    assert torch.equal(await read(pool, "x"), before)


async def test_it_stays_parked_while_its_base_comes_and_goes_and_goes_with_it(pool: Pool, tmp_path: Path) -> None:
    base = pool.used_bytes
    attached = await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "x", 1)))
    size, held = attached.nbytes, weakref.ref(attached.lens)
    await pool.detach("m", "x", park=True)
    await pool.park("m")
    assert (pool.used_bytes, pool.parked_bytes) == (0, base + size)
    await pool.restore("m")
    assert (pool.used_bytes, pool.parked_bytes) == (base, size)
    del attached
    await pool.unload("m")
    assert (pool.used_bytes, pool.parked_bytes, held()) == (0, 0, None)


async def test_beyond_the_limit_or_in_use_it_stays_where_it_is(pool: Pool, tmp_path: Path) -> None:
    size = (await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "x", 1)))).nbytes
    before, used, pool.park_bytes = await read(pool, "x"), pool.used_bytes, size - 1
    with pytest.raises(errors.Exhausted):
        await pool.detach("m", "x", park=True)
    pool.park_bytes = size
    with pool.get("m").lenses["x"].used(), pytest.raises(errors.Conflict, match="use the lens"):
        await pool.detach("m", "x", park=True)
    with pytest.raises(errors.NotFound):
        await pool.detach("m", "nobody", park=True)
    assert (pool.used_bytes, pool.parked_bytes) == (used, 0)
    await pool.detach("m", "x", park=True)
    pool.budget_bytes = used - 1
    with pytest.raises(errors.Exhausted):
        await pool.attach("m", pool.get("m").parked["x"].spec)
    assert pool.parked_bytes == size
    pool.budget_bytes = used
    await pool.attach("m", pool.get("m").parked["x"].spec)
    assert torch.equal(await read(pool, "x"), before)
    await pool.detach("m", "x", park=True)
    assert await pool.detach("m", "x") == size
    assert pool.parked_bytes == 0


@BOTH
async def test_layers_that_extensions_share_are_where_an_attached_one_needs_them(pool: Pool, tmp_path: Path) -> None:
    base, resident = pool.used_bytes, pool.get("m")
    first = folder(tmp_path / "first", 0, "hybrid")
    specs = [Spec("a", "extension", folder=first)]
    specs.append(Spec("b", "extension", folder=folder(tmp_path / "second", 3, "hybrid", shared=first)))
    for spec in specs:
        await pool.attach("m", spec)
    a, b = (resident.lenses[lens_id].nbytes for lens_id in "ab")
    layers = pool.used_bytes - base - a - b
    assert layers == resident.base_bytes - base > 0
    before = {lens_id: await read(pool, lens_id) for lens_id in "ab"}
    assert await pool.detach("m", "a", park=True) == a
    assert (pool.used_bytes, pool.parked_bytes) == (base + layers + b, a)
    assert torch.equal(await read(pool, "b"), before["b"])
    assert await pool.detach("m", "b", park=True) == layers + b
    assert pool.used_bytes == base
    await pool.attach("m", specs[0])
    assert (pool.used_bytes, pool.parked_bytes) == (base + layers + a, b)
    assert torch.equal(await read(pool, "a"), before["a"])
    assert await pool.detach("m", "a") == layers + a
    assert (pool.used_bytes, pool.parked_bytes) == (base, layers + b)
    await pool.attach("m", specs[1])
    assert torch.equal(await read(pool, "b"), before["b"])
    await pool.attach("m", specs[0])
    assert (pool.used_bytes, pool.parked_bytes) == (base + layers + a + b, 0)
    await pool.detach("m", "b", park=True)
    pool.park_bytes = b
    await pool.detach("m", "a")
    assert (pool.used_bytes, pool.parked_bytes, resident.parked) == (base, 0, {})


async def test_layers_that_an_attached_one_has_do_not_move_with_a_parked_one(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folder(tmp_path / "first", 0, "hybrid")
    a = (await pool.attach("m", Spec("a", "extension", folder=first))).lens
    second = folder(tmp_path / "second", 3, "hybrid", shared=first)
    b = (await pool.attach("m", Spec("b", "extension", folder=second))).lens
    moved: list[set[int]] = []

    def move(self: Extension, device: str, but: Collection[int] = ()) -> None:
        moved.append({id(tensor) for tensor in self.tensors} - set(but))

    monkeypatch.setattr(Extension, "move", move)
    await pool.detach("m", "b", park=True)
    own = {id(tensor) for tensor in b.tensors} - {id(tensor) for tensor in a.tensors}
    assert moved == [own] != [set()]


async def test_one_that_computes_something_else_when_it_is_back_is_dropped(pool: Pool, tmp_path: Path) -> None:
    base = pool.used_bytes
    spec = Spec("x", "extension", folder=folder(tmp_path / "x", 1))
    parameters = list((await pool.attach("m", spec)).lens._base.extensions["x"].parameters.values())  # type: ignore[attr-defined]
    await pool.detach("m", "x", park=True)
    with torch.no_grad():
        parameters[0].mul_(1.5)
    with pytest.raises(errors.Failed) as caught:
        await pool.attach("m", spec)
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert (pool.used_bytes, pool.parked_bytes, pool.get("m").lenses) == (base, 0, {})
    await pool.attach("m", spec)  # from its files


@pytest.mark.parametrize("what", ["base", "lens with its base", "lens"])
async def test_a_byte_that_changes_in_host_memory_is_found(pool: Pool, tmp_path: Path, what: str) -> None:
    """Also one that no forward pass of the fingerprint's few tokens reads."""
    spec, resident = tuned(tmp_path / "t"), pool.get("m")
    lens = (await pool.attach("m", spec)).lens
    await (pool.detach("m", "t", park=True) if what == "lens" else pool.park("m"))
    held = resident.base.model.get_input_embeddings().weight if what == "base" else lens.tensors[0]
    held.data.view(torch.uint8)[-1, -1] ^= 1
    assert fingerprint(resident.base.model) == resident.fingerprint
    with pytest.raises(errors.Failed) as caught:
        await (pool.attach("m", spec) if what == "lens" else pool.restore("m"))
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert (resident.parked, pool.parked_bytes) == ({}, 0)
    assert pool.residents == ([resident] if what == "lens" else [])


@pytest.mark.parametrize("pool", ["cpu"], indirect=True)
async def test_on_a_cpu_nothing_is_copied(pool: Pool, tmp_path: Path) -> None:
    spec, model = Spec("x", "extension", folder=folder(tmp_path / "x", 1)), pool.get("m").base.model
    lens = (await pool.attach("m", spec)).lens

    def places() -> list[int]:
        return [tensor.data_ptr() for tensor in (*tensors_of(model).values(), *lens.tensors)]

    before = places()
    await pool.detach("m", "x", park=True)
    await pool.park("m")
    assert places() == before
    await pool.restore("m")
    await pool.attach("m", spec)
    assert places() == before


@pytest.mark.parametrize("step", ["stow", "fetch"])
async def test_where_memory_runs_out_on_the_way_it_is_as_before(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    spec = Spec("x", "extension", folder=folder(tmp_path / "x", 1))
    lens = (await pool.attach("m", spec)).lens
    before, used = await read(pool, "x"), pool.used_bytes
    if step == "fetch":
        await pool.detach("m", "x", park=True)
    move, calls = type(lens).move, []

    def short(self: Any, device: str) -> None:
        calls.append(device)
        if len(calls) == 1:
            raise MemoryError
        move(self, device)

    monkeypatch.setattr(type(lens), "move", short)
    with pytest.raises(errors.Exhausted) as caught:
        await (pool.detach("m", "x", park=True) if step == "stow" else pool.attach("m", spec))
    assert caught.value.reason == "DEVICE_OOM"
    assert len(calls) == 2
    assert pool.used_bytes + pool.parked_bytes == used
    if step == "fetch":
        await pool.attach("m", spec)
    assert torch.equal(await read(pool, "x"), before)


async def test_other_files_under_its_id_take_its_place(pool: Pool, tmp_path: Path) -> None:
    await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "x", 1)))
    before = await read(pool, "x")
    await pool.detach("m", "x", park=True)
    await pool.attach("m", Spec("x", "extension", folder=folder(tmp_path / "y", 2)))
    assert pool.parked_bytes == 0
    assert not torch.equal(await read(pool, "x"), before)
