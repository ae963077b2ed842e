"""Several processes fill one cache: every unit is leased, made once, and the bytes are those of a single run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction import job, operations
from services.extraction.adapters import help as helping
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.help import HelpingRun
from services.extraction.adapters.postgres import QUERIES
from services.extraction.adapters.remote import RemoteUnits
from services.extraction.adapters.run import FETCHED_AT_ONCE, ClaimedRun
from services.kit import errors
from services.kit.database import Database
from services.residency.shards import ShardReader
from tests.support import eventually
from tests.wire.extraction_support import DATASET, Mesh, meshing
from tests.wire.test_extraction import texts
from tests.wire.test_extraction_interrupted import UNITS, contiguous_events, counted_plans, undisturbed


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    monkeypatch.setattr(helping, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(helping, "HELP_AFTER", timedelta(0))
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(64 * UNITS)}
        yield mesh


@pytest.fixture
def place() -> str:
    """Directory of the second process's state: the first one's, as on the same host."""
    return "state"


@pytest.fixture
async def other(database: Database, tmp_path: Path, mesh: Mesh, place: str) -> AsyncIterator[Mesh]:
    """A second process."""
    async with meshing(database, tmp_path / place, incarnation="incarnation-2") as other:
        other.registry.texts = mesh.registry.texts
        yield other


async def holders(mesh: Mesh) -> dict[str, int]:
    """Units that are done, by who made them."""
    counted = "SELECT holder, count(*) AS units FROM extraction_units WHERE digest IS NOT NULL GROUP BY holder"
    return {row["holder"]: row["units"] for row in await mesh.context.database.pool.fetch(counted)}


@pytest.mark.parametrize("place", ["state", "elsewhere"])
async def test_two_processes_make_one_cache_and_every_sequence_once(
    mesh: Mesh, other: Mesh, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = await undisturbed(mesh)
    made: dict[str, int] = {}
    lease, publish = ClaimedRun.lease_unit, ClaimedRun.publish

    async def leased_once_helped(self: ClaimedRun) -> int | None:
        if self._fences:  # the first unit is ours, the next one waits until somebody helped
            await eventually(lambda: _helped(mesh))
        return await lease(self)

    async def noted(self: ClaimedRun, product: Any) -> str:
        made.update(await holders(mesh))
        return await publish(self, product)

    monkeypatch.setattr(ClaimedRun, "lease_unit", leased_once_helped)
    monkeypatch.setattr(ClaimedRun, "publish", noted)
    started = await mesh.extract()
    with counted_plans(monkeypatch) as planned:
        async with other.background(), mesh.working():
            found = await mesh.ended(started.extraction_id)
    assert (found.status, found.storage_uri) == (pb.EXTRACTION_STATUS_COMPLETED, expected)
    assert (len(planned) == 1) == (place == "state"), "on one disk the helper reads the plan"
    assert sum(made.values()) == UNITS
    assert set(made) == {found.job_id, "incarnation-2"}
    reader = ShardReader(mesh.folder_of(found))
    assert reader.verify() == []
    seen = torch.cat([reader.shard(index)["seq"].unique() for index in range(UNITS)])
    assert sorted(seen.tolist()) == list(range(64 * UNITS))
    assert found.samples_processed == 64 * UNITS
    assert other.registry.loads == 1
    assert (await contiguous_events(mesh, started.extraction_id))[-1] == "completed"
    assert mesh.unfinished() == []


@pytest.mark.parametrize("place", ["elsewhere"])
async def test_what_another_host_lost_is_made_again(mesh: Mesh, other: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await undisturbed(mesh)
    fetch = RemoteUnits.fetch
    fetched: list[int] = []
    lease = ClaimedRun.lease_unit

    async def leased_once_helped(self: ClaimedRun) -> int | None:
        await eventually(lambda: _helped(mesh))
        return await lease(self)

    async def from_a_broken_disk(self: RemoteUnits, address: str, folder: WorkFolder, unit: int, fence: int) -> bool:
        there = WorkFolder(other.context.artifacts.root, folder.extraction_id)
        if not fetched:
            there.moments(unit, fence).unlink()
        elif len(fetched) == 1:
            there.shard(unit, fence).write_bytes(b"something else")
        fetched.append(unit)
        return await fetch(self, address, folder, unit, fence)

    monkeypatch.setattr(ClaimedRun, "lease_unit", leased_once_helped)
    monkeypatch.setattr(RemoteUnits, "fetch", from_a_broken_disk)
    started = await mesh.extract()
    async with other.background(), mesh.working():
        found = await mesh.ended(started.extraction_id)
    assert (found.status, found.storage_uri) == (pb.EXTRACTION_STATUS_COMPLETED, expected)
    assert fetched


@pytest.mark.parametrize("place", ["elsewhere"])
async def test_units_of_another_host_come_several_at_once_and_go_on_where_they_broke_off(
    mesh: Mesh, other: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(mesh)
    lease, fetch = ClaimedRun.lease_unit, RemoteUnits.fetch
    under_way, most, four = 0, 0, asyncio.Event()
    offsets: list[int] = []

    async def leased_once_all_are_made(self: ClaimedRun) -> int | None:
        await eventually(lambda: _made_by_other(mesh, UNITS), timeout=50)
        return await lease(self)

    async def together(self: RemoteUnits, *arguments: Any) -> bool:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == FETCHED_AT_ONCE:
            four.set()
        await four.wait()
        done = await fetch(self, *arguments)
        under_way -= 1
        return done

    async def breaking_off(path: Path, offset: int, end: int, *, what: str) -> AsyncIterator[bytes]:
        content = await asyncio.to_thread(path.read_bytes)
        if "moments" in path.name:
            yield content
            return
        offsets.append(offset)
        if offset:
            yield content[offset:]
        else:
            yield content[: end // 3]
            raise errors.Unavailable

    monkeypatch.setattr(ClaimedRun, "lease_unit", leased_once_all_are_made)
    monkeypatch.setattr(RemoteUnits, "fetch", together)
    monkeypatch.setattr(operations, "chunks", breaking_off)
    monkeypatch.setattr(job, "POLL_SECONDS", 60.0)  # nothing is fetched before everything is made
    started = await mesh.extract()
    async with other.background(), mesh.working():
        found = await mesh.ended(started.extraction_id)
    assert (found.status, found.storage_uri) == (pb.EXTRACTION_STATUS_COMPLETED, expected)
    assert most == FETCHED_AT_ONCE
    assert sorted(offsets)[:UNITS] == [0] * UNITS
    assert len(offsets) == 2 * UNITS, "each was asked for once more, and only for the rest"
    assert mesh.unfinished() == []


async def _made_by_other(mesh: Mesh, count: int) -> bool:
    return (await holders(mesh)).get("incarnation-2") == count


async def _helped(mesh: Mesh) -> bool:
    return "incarnation-2" in await holders(mesh)


async def test_a_helper_that_was_killed_loses_its_unit_and_can_give_nothing_any_more(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(mesh)
    late: list[object] = []
    resume, publish = ClaimedRun.resume, ClaimedRun.publish

    async def with_a_dead_helper(self: ClaimedRun, *arguments: Any) -> set[int]:
        done = await resume(self, *arguments)
        await mesh.context.database.pool.execute(
            "INSERT INTO extraction_units (extraction_id, unit, store_id, fence, holder, lease_until)"
            " VALUES ($1, 2, $2, 1, 'dead', clock_timestamp() + interval '0.3 seconds')",
            self._id,
            mesh.context.artifacts.store_id,
        )
        return done

    async def too_late(self: ClaimedRun, product: Any) -> str:
        late.append(await mesh.context.database.pool.fetchval(QUERIES["add_unit"], self._id, 2, 1, 10, "other"))
        return await publish(self, product)

    monkeypatch.setattr(ClaimedRun, "resume", with_a_dead_helper)
    monkeypatch.setattr(ClaimedRun, "publish", too_late)
    done = await mesh.extracted()
    assert done.storage_uri == expected
    assert late == [None]


async def test_help_ends_with_the_job(mesh: Mesh, other: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    held, left = asyncio.Event(), asyncio.Event()
    save = HelpingRun.save_unit

    async def late(self: HelpingRun, *arguments: Any) -> None:
        held.set()
        await left.wait()
        await save(self, *arguments)

    async def never(self: ClaimedRun) -> int | None:
        await self.unless_stopped(asyncio.Event().wait())
        return None

    monkeypatch.setattr(HelpingRun, "save_unit", late)
    monkeypatch.setattr(ClaimedRun, "lease_unit", never)
    started = await mesh.extract()
    async with other.background(), mesh.working():
        await held.wait()
        await mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id=started.extraction_id))
        assert (await mesh.ended(started.extraction_id)).status == pb.EXTRACTION_STATUS_CANCELLED
        left.set()
        await eventually(lambda: _true(other.registry.pool.residents[0].leases == 0))
    assert await holders(mesh) == {}
    assert mesh.unfinished() == []


async def _true(value: bool) -> bool:
    return value
