"""Caches stay within their limit, queues within theirs, and what nobody needs any more goes away by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction.adapters.files import WorkFolder
from services.kit.database import Database
from tests.support import eventually
from tests.wire.extraction_support import DATASET, Mesh, meshing
from tests.wire.test_extraction import refused, texts


@pytest.fixture
def open_mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same state under other settings, as often as a test wants."""
    torch.set_num_threads(1)

    @asynccontextmanager
    async def opened(**settings: object) -> AsyncIterator[Mesh]:
        for name, value in settings.items():
            monkeypatch.setenv(f"LENSMESH_{name.upper()}", str(value))
        async with meshing(database, tmp_path / "state") as mesh:
            mesh.registry.texts = {DATASET: texts(64)}
            yield mesh

    return opened


async def ids(mesh: Mesh) -> set[str]:
    listed = await mesh.stub.ListActivationCaches(pb.ListActivationCachesRequest())
    return {cache.id for cache in listed.activation_caches}


async def test_the_least_recently_used_cache_makes_room_but_never_under_a_reader(open_mesh: Any) -> None:
    async with open_mesh() as mesh:
        oldest, used, third = [await mesh.extracted(seed=seed) for seed in range(3)]
        size = third.file_size_bytes
        await mesh.stub.OpenCache(pb.OpenCacheRequest(id=oldest.cache_id))
    async with open_mesh(activation_cache_limit=3 * size + size // 2) as mesh:
        fourth = await mesh.extracted(seed=3)
        assert await ids(mesh) == {oldest.cache_id, third.cache_id, fourth.cache_id}
        assert not (await mesh.get(used.extraction_id)).HasField("cache_id")
    async with open_mesh(activation_cache_limit=size + size // 2) as mesh:
        store = mesh.context.artifacts
        async with store.reading(mesh.context.database, oldest.storage_uri), mesh.working():
            found = await mesh.ended((await mesh.extract(seed=4)).extraction_id)
        assert (found.status, found.error_code) == (pb.EXTRACTION_STATUS_FAILED, "CACHE_FULL")
        assert mesh.folder_of(oldest).is_dir()
        assert mesh.unfinished() == []


async def test_what_can_never_fit_deletes_nothing(open_mesh: Any) -> None:
    async with open_mesh() as mesh:
        done = await mesh.extracted()
    async with open_mesh(activation_cache_limit=done.file_size_bytes // 2) as mesh:
        plan = await mesh.extract(seed=1, validate_only=True)
        assert (plan.cache, plan.fits_limit) == (pb.CACHE_MATCH_MISS, False)
        async with mesh.working():
            found = await mesh.ended((await mesh.extract(seed=1)).extraction_id)
        assert found.error_code == "CACHE_FULL"
        assert await ids(mesh) == {done.cache_id}


async def test_the_queue_has_an_end(open_mesh: Any) -> None:
    async with open_mesh(extraction_queue_limit=2) as mesh:
        for seed in range(2):
            await mesh.extract(seed=seed)
        code, reason, _ = await refused(mesh.extract(seed=2))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest())).total == 2


async def test_more_than_may_run_wait_and_say_for_what(open_mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_mesh(max_concurrent_extractions=1) as mesh:
        first, second = [await mesh.extract(seed=seed, batch_size=1) for seed in range(2)]
        async with mesh.working():

            async def waits() -> str:
                one, two = [await mesh.get(found.extraction_id) for found in (first, second)]
                assert two.status != pb.EXTRACTION_STATUS_EXTRACTING or one.status == pb.EXTRACTION_STATUS_COMPLETED
                return two.waiting_for if one.status == pb.EXTRACTION_STATUS_EXTRACTING else ""

            assert "running extraction" in await eventually(waits)
            assert (await mesh.ended(second.extraction_id)).status == pb.EXTRACTION_STATUS_COMPLETED


async def test_what_nobody_needs_goes_away(open_mesh: Any) -> None:
    async with open_mesh() as mesh:
        kept, unused, lost = [await mesh.extracted(seed=seed) for seed in range(3)]
        waiting = await mesh.extract(seed=9)
        root, pool = mesh.context.artifacts.root, mesh.context.database.pool
        for extraction_id in (kept.extraction_id, waiting.extraction_id, "ext_act_unknown"):
            folder = WorkFolder(root, extraction_id)
            folder.open()
            folder.write(0, 1, {"x": torch.zeros(1)}, {"x": torch.zeros(1)})
        month_ago = datetime.now(UTC) - timedelta(days=31)
        await pool.execute(
            "UPDATE activation_cache SET last_accessed_at = $1 WHERE id = $2", month_ago, unused.cache_id
        )
        await pool.execute("UPDATE artifacts SET used_at = $1 WHERE uri = $2", month_ago, unused.storage_uri)
        await mesh.context.artifacts.delete(mesh.context.database, lost.storage_uri)
        folder = mesh.folder_of(unused)
        async with mesh.background():

            async def tidy() -> bool:
                tidied = await ids(mesh) == {kept.cache_id} and mesh.unfinished() == [waiting.extraction_id]
                return tidied and mesh.context.metrics.get_sample_value("cache_bytes") == kept.file_size_bytes

            await eventually(tidy)
        assert not folder.exists()
        assert mesh.folder_of(kept).is_dir()
        value = mesh.context.metrics.get_sample_value
        assert value("extraction_requests_total", {"cache": "miss"}) == 4
        assert value("extract_tokens_total") == 3 * kept.tokens
        assert 0 < value("extract_bytes_written_total") < 3 * kept.file_size_bytes
