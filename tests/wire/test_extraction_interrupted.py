"""Whatever ends an extraction early, it goes on from its last unit to the same bytes, or leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction import preparing
from services.extraction.adapters import files
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.run import ClaimedRun
from services.extraction.compute import UnitFiller, make_plan
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database
from services.kit.events import EventLog
from services.residency.shards import FileEntry, ShardReader
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL, Mesh, meshing
from tests.wire.test_extraction import refused, texts

UNITS = 5
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    async with meshing(database, tmp_path / "state", lease_seconds=1.5) as mesh:
        mesh.registry.texts = {DATASET: texts(64 * UNITS), "ds_other": texts(64)}
        yield mesh


async def undisturbed(mesh: Mesh, **changes: Any) -> str:
    """Handle, and so the digest of every byte, of an extraction that nothing disturbs; its cache is deleted again."""
    done = await mesh.extracted(**changes)
    assert len(ShardReader(mesh.folder_of(done)).manifest.shards) == UNITS
    await mesh.stub.DeleteActivationCache(pb.DeleteActivationCacheRequest(id=done.cache_id))
    return done.storage_uri


async def units(mesh: Mesh) -> list[int]:
    rows = await mesh.context.database.pool.fetch(
        "SELECT unit FROM extraction_units WHERE digest IS NOT NULL ORDER BY unit"
    )
    return [row["unit"] for row in rows]


async def lapsed(mesh: Mesh) -> bool:
    """Whether the lease of every job is over, so that the next worker takes it at once."""
    return not await mesh.context.database.pool.fetchval(
        "SELECT count(*) FROM jobs WHERE lease_until > clock_timestamp()"
    )


@contextmanager
def counted_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Units whose batches run, one entry per batch."""
    ran: list[int] = []
    run = UnitFiller.run

    def counting(self: UnitFiller, *arguments: Any) -> int:
        ran.append(self.unit.index)
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(UnitFiller, "run", counting)
        yield ran


@contextmanager
def counted_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Digests of the plans that are made rather than read."""
    made: list[str] = []

    def counting(*arguments: Any, **options: Any) -> Any:
        plan = make_plan(*arguments, **options)
        made.append(plan.digest)
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "make_plan", counting)
        yield made


async def contiguous_events(mesh: Mesh, extraction_id: str) -> list[str]:
    events = await EventLog(mesh.context.database).after([f"extraction:{extraction_id}"], {})
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.event.partition(":")[2] for event in events]


async def test_kill_9_in_the_middle(
    mesh: Mesh, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(mesh, batch_size=1)
    (tmp_path / "texts.json").write_text(json.dumps(mesh.registry.texts[DATASET]))
    started = await mesh.extract(batch_size=1)
    arguments = (database_url, str(tmp_path / "state"), str(tmp_path / "texts.json"))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.wire.extraction_child", *arguments, cwd=ROOT
    )
    try:
        await eventually(lambda: units(mesh), timeout=60)
    finally:
        child.kill()
        await child.wait()
    done = await units(mesh)
    assert 0 < len(done) < UNITS
    assert mesh.unfinished() == [started.extraction_id]
    await eventually(lambda: lapsed(mesh))
    with counted_batches(monkeypatch) as ran, counted_plans(monkeypatch) as planned:
        async with mesh.working("second"):
            found = await mesh.ended(started.extraction_id)
    assert (found.status, found.storage_uri) == (pb.EXTRACTION_STATUS_COMPLETED, expected)
    assert set(ran) == set(range(UNITS)) - set(done)
    assert planned == [], "the plan was stored"
    assert (await mesh.context.jobs.get(found.job_id)).attempt == 2
    names = await contiguous_events(mesh, started.extraction_id)
    assert (names.count("started"), names.count("completed"), names[-1]) == (2, 1, "completed")
    assert mesh.unfinished() == []


class Crash(BaseException):
    """Ends a job's task as a crash would: nothing that the code does about errors happens."""


class Trap:
    """Makes one call of a method crash, before or after its work."""

    def __init__(self, owner: type, name: str, call: int = 1, *, after: bool) -> None:
        self.sprung = False
        self._owner, self._name, self._left, self._after = owner, name, call, after

    def arm(self, patch: pytest.MonkeyPatch) -> None:
        original = getattr(self._owner, self._name)
        if inspect.iscoroutinefunction(original):

            async def asynchronous(*arguments: Any, **options: Any) -> Any:
                self._crash(now=not self._after, count=True)
                result = await original(*arguments, **options)
                self._crash(now=self._after, count=False)
                return result

            patch.setattr(self._owner, self._name, asynchronous)
            return

        def synchronous(*arguments: Any, **options: Any) -> Any:
            self._crash(now=not self._after, count=True)
            result = original(*arguments, **options)
            self._crash(now=self._after, count=False)
            return result

        patch.setattr(self._owner, self._name, synchronous)

    def _crash(self, *, now: bool, count: bool) -> None:
        self._left -= count
        if now and self._left == 0 and not self.sprung:
            self.sprung = True
            raise Crash


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Trap(ClaimedRun, "resume", after=True), id="before the first unit"),
        pytest.param(lambda: Trap(WorkFolder, "write", 2, after=False), id="before a unit is written"),
        pytest.param(lambda: Trap(WorkFolder, "write", 2, after=True), id="between a unit's files and its row"),
        pytest.param(lambda: Trap(ClaimedRun, "save_unit", 3, after=True), id="after a unit's row"),
        pytest.param(lambda: Trap(ClaimedRun, "publish", after=False), id="before the cache is assembled"),
        pytest.param(lambda: Trap(ArtifactStore, "publish", after=True), id="between the cache's files and its row"),
        pytest.param(lambda: Trap(ClaimedRun, "discard", after=False), id="after the cache's row"),
        pytest.param(lambda: Trap(ClaimedRun, "publish", after=True), id="before the job's row says so"),
    ],
)
async def test_a_crash_at_any_point_leads_to_the_same_bytes(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Trap]
) -> None:
    expected = await undisturbed(mesh)
    started = await mesh.extract()
    trap = make()
    with monkeypatch.context() as patch:
        trap.arm(patch)
        async with mesh.working("crashes"):
            await eventually(lambda: trap.sprung)
            await eventually(lambda: lapsed(mesh))
    async with mesh.working("second"):
        found = await mesh.ended(started.extraction_id)
    assert (found.status, found.storage_uri) == (pb.EXTRACTION_STATUS_COMPLETED, expected)
    assert ShardReader(mesh.folder_of(found)).verify() == []
    assert mesh.unfinished() == []
    names = await contiguous_events(mesh, started.extraction_id)
    assert (names.count("completed"), names[-1]) == (1, "completed")


async def test_a_damaged_unit_or_plan_is_made_again(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await undisturbed(mesh)
    started = await mesh.extract()
    trap = Trap(ClaimedRun, "publish", after=False)
    with monkeypatch.context() as patch:
        trap.arm(patch)
        async with mesh.working("crashes"):
            await eventually(lambda: trap.sprung)
            await eventually(lambda: lapsed(mesh))
    folder = mesh.context.artifacts.root / ".extractions" / started.extraction_id
    shard = folder / "unit-00002.1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (folder / "unit-00004.1.moments.safetensors").unlink()
    plan = folder / "plan.safetensors"
    plan.write_bytes(plan.read_bytes()[:-1] + b"\x7f")
    digest = "SELECT plan_digest FROM extractions WHERE id = $1"
    stored = await mesh.context.database.pool.fetchval(digest, started.extraction_id)
    with counted_batches(monkeypatch) as ran, counted_plans(monkeypatch) as planned:
        async with mesh.working("second"):
            found = await mesh.ended(started.extraction_id)
    assert set(ran) == {2, 4}
    assert planned == [stored]
    assert found.storage_uri == expected


async def test_data_that_changed_between_two_attempts_is_extracted_anew(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = await mesh.extract()
    trap = Trap(ClaimedRun, "publish", after=False)
    with monkeypatch.context() as patch:
        trap.arm(patch)
        async with mesh.working("crashes"):
            await eventually(lambda: trap.sprung)
            await eventually(lambda: lapsed(mesh))
    mesh.registry.texts[DATASET] = texts(64 * UNITS)[::-1]
    with counted_batches(monkeypatch) as ran:
        async with mesh.working("second"):
            found = await mesh.ended(started.extraction_id)
    assert set(ran) == set(range(UNITS))
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_COMPLETED  # and it is known as what it is
    table = ShardReader(mesh.folder_of(found)).sequences()
    mesh.registry.texts[DATASET] = texts(64 * UNITS)
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_QUEUED
    assert len(table["row"]) == 64 * UNITS


async def test_cancel_ends_it_within_a_batch_and_leaves_nothing(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await mesh.extract(batch_size=1)
    with counted_batches(monkeypatch) as ran:
        async with mesh.working():
            await eventually(lambda: units(mesh))
            before = len(ran)
            await mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id=started.extraction_id))
            found = await mesh.ended(started.extraction_id)
    assert found.status == pb.EXTRACTION_STATUS_CANCELLED
    assert len(ran) < before + 64
    assert not found.HasField("cache_id")
    assert mesh.unfinished() == []
    assert (await contiguous_events(mesh, started.extraction_id))[-1] == "cancelled"
    again = await mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id=started.extraction_id))
    assert again.status == pb.EXTRACTION_STATUS_CANCELLED


async def test_a_finished_extraction_cannot_be_cancelled(mesh: Mesh) -> None:
    done = await mesh.extracted(dataset_id="ds_other")
    reused = await mesh.extract(dataset_id="ds_other")
    for extraction_id in (done.extraction_id, reused.extraction_id):
        call = mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id=extraction_id))
        assert (await refused(call))[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")


async def test_pause_and_resume(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await undisturbed(mesh, batch_size=1)
    started = await mesh.extract(batch_size=1)
    async with mesh.working():
        await eventually(lambda: units(mesh))
        await mesh.stub.PauseExtraction(pb.PauseExtractionRequest(id=started.extraction_id))

        async def paused() -> bool:
            return (await mesh.get(started.extraction_id)).status == pb.EXTRACTION_STATUS_PAUSED

        await eventually(paused)
        done = await units(mesh)
        assert 0 < len(done) < UNITS
        with counted_batches(monkeypatch) as ran:
            await mesh.stub.ResumeExtraction(pb.ResumeExtractionRequest(id=started.extraction_id))
            found = await mesh.ended(started.extraction_id)
    assert set(ran) == set(range(UNITS)) - set(done)
    assert found.storage_uri == expected
    for call in (
        mesh.stub.PauseExtraction(pb.PauseExtractionRequest(id=started.extraction_id)),
        mesh.stub.ResumeExtraction(pb.ResumeExtractionRequest(id=started.extraction_id)),
    ):
        assert (await refused(call))[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")


async def test_without_a_loaded_model_a_job_waits_or_fails_where_it_is_told_to(mesh: Mesh) -> None:
    async with mesh.working():
        failing = await mesh.extract(dataset_id="ds_other", if_unloaded=pb.IF_UNLOADED_FAIL)
        found = await mesh.ended(failing.extraction_id)
        assert (found.status, found.error_code) == (pb.EXTRACTION_STATUS_FAILED, "EXTRACTION_FAILED")
        assert "not loaded" in found.error_message
        waiting = await mesh.extract(dataset_id="ds_other", if_unloaded=pb.IF_UNLOADED_WAIT)

        async def waits() -> bool:
            return (await mesh.get(waiting.extraction_id)).waiting_for == "its model to be loaded"

        await eventually(waits)
        assert mesh.registry.loads == 0
        await mesh.registry.pool.load(MODEL, mesh.registry.folder, "none")
        assert (await mesh.ended(waiting.extraction_id)).status == pb.EXTRACTION_STATUS_COMPLETED
    assert mesh.unfinished() == []


async def test_a_full_disk_fails_the_job_and_leaves_nothing_and_others_go_on(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def full(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
        ours = path.parent.name == started.extraction_id
        calls.extend([path] * ours)
        if ours and len(calls) > 3:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, tensors)

    original = files.write_tensors
    monkeypatch.setattr(files, "write_tensors", full)
    await mesh.registry.pool.load(MODEL, mesh.registry.folder, "none")
    started, other = await mesh.extract(), await mesh.extract(dataset_id="ds_other")
    async with mesh.working(slots=2):
        found, beside = [await mesh.ended(each.extraction_id) for each in (started, other)]
    assert (found.status, found.error_code) == (pb.EXTRACTION_STATUS_FAILED, "CACHE_FULL")
    assert beside.status == pb.EXTRACTION_STATUS_COMPLETED
    assert mesh.unfinished() == []
    monkeypatch.setattr(files, "write_tensors", original)
    assert (await mesh.extracted()).status == pb.EXTRACTION_STATUS_COMPLETED
