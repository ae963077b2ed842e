"""The pool's promises: loads are transactions, the ledger is the truth, leases hold, lenses leave no trace."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from services.kit import errors
from services.residency import attachments, loading
from services.residency.fingerprint import fingerprint
from services.residency.lenses import Spec
from services.residency.pool import Pool
from services.residency.quantize import QUANTIZATIONS, resident_bytes
from services.residency.splice import logits
from tests import models

GIB = 1 << 30


@pytest.fixture
async def pool():
    made = Pool("cpu", GIB, GIB)
    yield made
    await made.close()


def assert_ledger_is_the_truth(pool: Pool) -> None:
    held = sum(resident_bytes(resident.base.model) for resident in pool.residents)
    lenses = sum(attached.lens.nbytes for resident in pool.residents for attached in resident.lenses.values())
    assert pool.used_bytes == held + lenses
    assert pool.reserved_bytes == 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
async def test_a_loaded_model_is_counted_to_the_byte_and_gone_after_unload(pool, quantization):
    seen = []
    resident = await pool.load(
        "m", models.saved("llama"), quantization, progress=lambda done, total: seen.append(done / total)
    )
    assert_ledger_is_the_truth(pool)
    assert pool.used_bytes == resident.nbytes > 0
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert (
        max(b - a for a, b in zip([0.0, *seen], seen, strict=False)) <= 0.25
    )  # the largest tensor is a read of its own
    assert await pool.unload("m") == resident.nbytes
    assert (pool.used_bytes, pool.residents) == (0, [])


async def test_loading_a_loaded_model_again_does_nothing(pool):
    first = await pool.load("m", models.saved("gpt2"), "none")
    assert await pool.load("m", models.saved("gpt2"), "none") is first
    with pytest.raises(errors.Conflict) as caught:
        await pool.load("m", models.saved("gpt2"), "int8")
    assert caught.value.metadata == {"quantization": "none"}


async def test_a_second_load_of_the_same_model_while_it_loads_is_refused(pool):
    entered, leave = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        entered.set()
        leave.wait()

    first = asyncio.create_task(pool.load("m", models.saved("gpt2"), "none", progress=wait))
    await asyncio.to_thread(entered.wait)
    with pytest.raises(errors.Conflict) as caught:
        await pool.load("m", models.saved("gpt2"), "none")
    leave.set()
    await first
    assert caught.value.reason == "ALREADY_LOADING"
    assert_ledger_is_the_truth(pool)


async def test_a_model_that_does_not_fit_is_refused_with_both_numbers_and_nothing_changes(pool):
    await pool.load("a", models.saved("gpt2"), "none")
    pool.budget_bytes = pool.used_bytes + 1000
    with pytest.raises(errors.Exhausted) as caught:
        await pool.load("b", models.saved("llama"), "none")
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert caught.value.metadata["required_memory_gb"] > caught.value.metadata["available_memory_gb"] >= 0
    assert [resident.model_id for resident in pool.residents] == ["a"]
    assert_ledger_is_the_truth(pool)


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header_of_another_length(path):
    file = path / "model.safetensors"
    file.write_bytes((1 << 63).to_bytes(8, "little") + file.read_bytes()[8:])


def no_json(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:40] = b"\xff" * 20
    file.write_bytes(content)


def no_config(path):
    (path / "config.json").unlink()


def other_width(path):
    config = path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 500'))


def half_the_tensors(path):
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    kept = dict(list(load_file(file).items())[::2])
    save_file({name: tensor.clone() for name, tensor in kept.items()}, file)


def only_a_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def broken_tokenizer(path):
    (path / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "MODEL_LOAD_FAILED"),
        (header_of_another_length, "MODEL_LOAD_FAILED"),
        (no_json, "MODEL_LOAD_FAILED"),
        (no_config, "MODEL_LOAD_FAILED"),
        (other_width, "MODEL_LOAD_FAILED"),
        (half_the_tensors, "MODEL_LOAD_FAILED"),
        (broken_tokenizer, "MODEL_LOAD_FAILED"),
        (only_a_pickle, "UNSAFE_FORMAT"),
    ],
)
async def test_damaged_files_leave_nothing_resident_and_no_path_in_the_message(pool, tmp_path, damage, reason):
    path = models.copied(tmp_path, "gpt2")
    damage(path)
    with pytest.raises(errors.Failed) as caught:
        await pool.load("m", path, "none")
    assert caught.value.reason == reason
    assert str(tmp_path) not in caught.value.message
    assert (pool.used_bytes, pool.reserved_bytes, pool.residents) == (0, 0, [])
    assert (await pool.load("m", models.saved("gpt2"), "none")).nbytes == pool.used_bytes


async def test_a_failed_load_frees_what_it_had_read(pool, monkeypatch):
    import gc
    import weakref

    alive = []
    original = loading.skeleton

    def remembered(*args):
        model = original(*args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "skeleton", remembered)

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise MemoryError

    with pytest.raises(errors.Exhausted) as caught:
        await pool.load("m", models.saved("gpt2"), "none", progress=fail)
    assert caught.value.reason == "DEVICE_OOM"
    gc.collect()
    assert [reference() for reference in alive] == [None]


async def test_a_cancelled_load_stops_reading_and_leaves_nothing(pool):
    entered, leave, calls = threading.Event(), threading.Event(), []

    def wait(done: int, total: int) -> None:
        calls.append(done)
        entered.set()
        leave.wait()

    task = asyncio.create_task(pool.load("m", models.saved("gpt2"), "none", progress=wait))
    await asyncio.to_thread(entered.wait)
    task.cancel()
    await asyncio.sleep(0)
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 1
    assert (pool.used_bytes, pool.reserved_bytes, pool.residents) == (0, 0, [])


async def test_other_files_than_expected_are_refused(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    await pool.unload("m")
    with pytest.raises(errors.Failed) as caught:
        await pool.load("m", models.saved("gpt2"), "none", expected_digest="0" * 64)
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    with pytest.raises(errors.Failed) as caught:
        await pool.load("m", models.saved("gpt2"), "bf16", expected_fingerprint=resident.fingerprint)
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert pool.residents == []
    again = await pool.load(
        "m",
        models.saved("gpt2"),
        "none",
        expected_digest=resident.base.digest,
        expected_fingerprint=resident.fingerprint,
    )
    assert again.fingerprint == resident.fingerprint


async def test_a_leased_model_is_not_unloaded_until_the_lease_ends(pool):
    await pool.load("m", models.saved("gpt2"), "none")
    async with pool.lease("m"):
        with pytest.raises(errors.Conflict) as caught:
            await pool.unload("m")
        assert caught.value.reason == "IN_USE"
        unloading = asyncio.create_task(pool.unload("m", wait_seconds=60))
        await asyncio.sleep(0)
        with pytest.raises(errors.Conflict, match="leaving"):
            await pool.lease("m").__aenter__()
        assert not unloading.done()
    assert await unloading > 0
    with pytest.raises(errors.Conflict, match="not loaded"):
        await pool.lease("m").__aenter__()


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
async def test_park_and_restore_keep_every_bit(pool, quantization):
    await pool.load("m", models.saved("llama"), quantization)
    async with pool.lease("m") as lease:
        before = await lease.run(logits, lease.model, models.batch())
    await pool.park("m")
    with pytest.raises(errors.Conflict, match="parked"):
        await pool.lease("m").__aenter__()
    await pool.restore("m")
    async with pool.lease("m") as lease:
        assert torch.equal(await lease.run(logits, lease.model, models.batch()), before)
    assert_ledger_is_the_truth(pool)


async def test_parked_models_leave_the_budget_and_fill_the_host_memory_s_limit(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    size = resident.total_bytes
    assert await pool.park("m") == size
    assert (pool.used_bytes, pool.parked_bytes) == (0, size)
    await pool.load("n", models.saved("gpt2"), "none")
    pool.park_bytes = 2 * size - 1
    with pytest.raises(errors.Exhausted) as caught:
        await pool.park("n")
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert (pool.used_bytes, pool.parked_bytes) == (size, size)
    pool.budget_bytes = 2 * size - 1
    with pytest.raises(errors.Exhausted):
        await pool.restore("m")
    await pool.unload("n")
    await pool.restore("m")
    assert (pool.used_bytes, pool.parked_bytes) == (size, 0)


async def test_a_restored_model_that_computes_something_else_is_dropped(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    await pool.park("m")
    with torch.no_grad():
        resident.base.model.transformer.ln_f.weight[0] += 1e-3
    with pytest.raises(errors.Failed) as caught:
        await pool.restore("m")
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert (pool.used_bytes, pool.residents) == (0, [])


async def test_a_lens_that_leaves_a_trace_in_the_base_is_found(pool, monkeypatch):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    gain = resident.base.model.transformer.ln_f.weight.data
    await pool.attach("m", Spec("kept", "logit_lens"))
    clean, load = gain.clone(), attachments.load_lens
    monkeypatch.setattr(attachments, "load_lens", lambda *arguments: (load(*arguments), gain.add_(1e-3))[0])
    for call in (pool.attach("m", Spec("l", "logit_lens")), pool.detach("m", "kept")):
        with pytest.raises(errors.Failed) as caught:
            await call
        assert caught.value.reason == "FINGERPRINT_MISMATCH"
    assert resident.lenses == {}
    gain.copy_(clean)
    monkeypatch.undo()
    await pool.attach("m", Spec("l", "logit_lens"))


async def test_a_lens_of_another_base_is_refused_with_both_values(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    with pytest.raises(errors.Conflict) as caught:
        await pool.attach("m", Spec("l", "logit_lens", base_digest="f" * 64))
    assert caught.value.reason == "LENS_INCOMPATIBLE"
    assert caught.value.metadata == {"what": "base", "expected": "f" * 64, "found": resident.base.digest}
    assert resident.lenses == {}
    assert_ledger_is_the_truth(pool)


async def test_switching_to_a_lens_that_is_not_attached_keeps_the_active_one(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    await pool.attach("m", Spec("l", "logit_lens"))
    await pool.switch("m", "l")
    with pytest.raises(errors.NotFound):
        await pool.switch("m", "other")
    assert resident.active == "l"
    await pool.detach("m", "l")
    assert (resident.active, resident.lenses) == (None, {})


async def test_other_files_under_a_lens_id_take_the_place_of_the_old_ones(pool):
    resident = await pool.load("m", models.saved("gpt2"), "none")
    first = await pool.attach("m", Spec("l", "logit_lens"))
    assert await pool.attach("m", Spec("l", "logit_lens")) is first
    await pool.switch("m", "l")
    second = await pool.attach("m", Spec("l", "logit_lens", base_digest=resident.base.digest))
    assert second is not first
    assert (resident.active, list(resident.lenses.values())) == (None, [second])
    assert_ledger_is_the_truth(pool)


async def test_torch_work_runs_on_one_thread_and_the_loop_stays_free(pool):
    names = await asyncio.gather(*(pool.run(lambda: threading.current_thread().name) for _ in range(8)))
    assert len(set(names)) == 1
    assert names[0] != threading.current_thread().name


async def test_two_leases_share_one_copy(pool):
    await pool.load("m", models.saved("gpt2"), "none")
    async with pool.lease("m") as one, pool.lease("m") as two:
        assert one.model is two.model
        assert one.record.leases == 2
        assert fingerprint(one.model) == one.record.fingerprint
