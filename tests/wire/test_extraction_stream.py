"""Live streams of activations: every row once a pass, shuffled, the same after any break, by file and by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc

from services.extraction import streaming
from services.extraction.adapters import places
from services.kit.channels import open_blocking_channel
from services.kit.database import Database
from services.residency.live import LiveRows
from services.residency.shards import ShardReader
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MLP_PAIR, MODEL, Mesh, meshing
from tests.wire.test_extraction import refused, texts

X, Y = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
ROW_BYTES = 2 * models.WIDTH * 4


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100 * (ROW_BYTES + streaming.TABLE_BYTES))
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(64), "ds_empty": [""]}
        yield mesh


def request(**changes: Any) -> pb.StreamActivationsRequest:
    """One layer's MLP pair, in a buffer that holds about a quarter of the dataset."""
    wanted = {"model_id": MODEL, "dataset_id": DATASET, "layer_indices": [1], "sites": MLP_PAIR}
    names = {
        name: changes.pop(name)
        for name in list(changes)
        if name in pb.ExtractActivationsRequest.DESCRIPTOR.fields_by_name
    }
    extraction = pb.ExtractActivationsRequest(**wanted | names)
    return pb.StreamActivationsRequest(extraction=extraction, **{"buffer_bytes": 2 * 300 * ROW_BYTES} | changes)


async def read(mesh: Mesh, work: Callable[[Any], Any]) -> Any:
    """What `work` makes of the blocking stub's method, on a thread, as a training process would."""

    def call() -> Any:
        with open_blocking_channel(mesh.address, mesh.settings) as channel:
            return work(extraction_pb2_grpc.ExtractionServiceStub(channel).StreamActivations)

    return await asyncio.to_thread(call)


def rows_of(call: Any, *, count: int, start: int = 0, folder: Path | None = None, batch_size: int = 64) -> torch.Tensor:
    """x and y beside each other, [count - start, 2 * width]."""
    live = LiveRows(call, request(rows=count), folder)
    found = [torch.cat([batch.rows[X], batch.rows[Y]], 1) for batch in live.iter_rows(batch_size, start)]
    live.close()
    return torch.cat(found)[: count - start]


def sorted_rows(rows: torch.Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


async def test_every_pass_has_every_row_of_the_cache_once_in_another_order(mesh: Mesh) -> None:
    done = await mesh.extracted(layer_indices=[1])
    reader = ShardReader(mesh.folder_of(done))
    shards = [reader.shard(index) for index in range(len(reader.manifest.shards))]
    cached = torch.cat([torch.cat([shard[X], shard[Y]], 1) for shard in shards])
    tokens = len(cached)
    found = await read(mesh, lambda call: rows_of(call, count=2 * tokens))
    first, second = found[:tokens], found[tokens:]
    for part in (first, second):
        torch.testing.assert_close(
            torch.tensor(sorted_rows(part)), torch.tensor(sorted_rows(cached)), rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(first, second)
    facts = await read(mesh, lambda call: LiveRows(call, request()).facts)
    assert (facts.rows_per_pass, list(facts.hook_points), list(facts.widths)) == (tokens, [X, Y], [models.WIDTH] * 2)
    assert facts.identity_error < 1e-5


async def test_files_and_chunks_carry_the_same_rows_from_any_cursor(mesh: Mesh) -> None:
    with mesh.context.artifacts.staging("stream") as folder:
        whole = await read(mesh, lambda call: rows_of(call, count=900, folder=folder))
        assert list(folder.iterdir()) == []
    for start in (1, 99, 100, 450, 899):
        assert torch.equal(await read(mesh, lambda call, s=start: rows_of(call, count=900, start=s)), whole[start:])


async def test_a_broken_stream_goes_on_behind_the_last_byte(mesh: Mesh) -> None:
    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    asked: list[tuple[int, int]] = []

    def breaking(call: Any) -> Any:
        def opened(message: pb.StreamActivationsRequest) -> Any:
            asked.append((message.cursor, message.offset))
            for number, answer in enumerate(call(message)):
                yield answer
                if number == 3 and len(asked) < 4:
                    raise Broken

        return opened

    streaming_chunk = streaming.CHUNK_BYTES
    try:
        streaming.CHUNK_BYTES = 10_000  # several messages a block
        whole = await read(mesh, lambda call: rows_of(call, count=400))
        assert torch.equal(await read(mesh, lambda call: rows_of(breaking(call), count=400)), whole)
    finally:
        streaming.CHUNK_BYTES = streaming_chunk
    assert len(asked) == 4
    assert any(offset for _, offset in asked)
    assert asked == sorted(asked)


async def test_computing_waits_for_the_reader(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    original = streaming.UnitFiller

    def counted(*arguments: Any, **options: Any) -> Any:
        filled.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(streaming, "UnitFiller", counted)
    with mesh.context.artifacts.staging("stream") as folder:
        call = mesh.stub.StreamActivations(request(place=folder.name))
        assert (await call.read()).facts.by_handle
        blocks = [(await call.read()).block for _ in range(places.WINDOW)]
        assert len(list(folder.iterdir())) == places.WINDOW
        further = asyncio.ensure_future(call.read())
        done, _ = await asyncio.wait({further}, timeout=0.1)
        assert not done
        assert len(filled) <= 4  # two that were sent, the one whose block waits, and one ahead
        (folder / blocks[0].handle).unlink()
        assert (await further).block.first_row == blocks[-1].first_row + blocks[-1].rows
        call.cancel()
        record = mesh.registry.pool.get(MODEL)
        await eventually(lambda: _true(not record.leases))


async def _true(value: bool) -> bool:
    return value


async def test_no_more_streams_than_allowed(mesh: Mesh) -> None:
    calls = []
    for _ in range(4):
        calls.append(mesh.stub.StreamActivations(request()))
        assert (await calls[-1].read()).HasField("facts")
    code, reason, _ = await refused(mesh.stub.StreamActivations(request()).read())
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    calls[0].cancel()

    async def admitted() -> bool:
        try:
            return (await mesh.stub.StreamActivations(request()).read()).HasField("facts")
        except grpc.aio.AioRpcError:
            return False

    await eventually(admitted)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer_indices": [4]}, "extraction.layer_indices"),
        ({"sites": ["mlp"]}, "extraction.sites"),
        ({"layout": pb.LAYOUT_SEQUENCES}, "extraction.layout"),
        ({"sample_count": 0}, "extraction.sample_count"),
        ({"cursor": -1}, "cursor"),
        ({"dataset_id": "ds_empty"}, "extraction.dataset_id"),
    ],
)
async def test_a_wrong_field_is_named(mesh: Mesh, changes: dict[str, Any], field: str) -> None:
    code, _, fields = await refused(mesh.stub.StreamActivations(request(**changes)).read())
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_only_a_readers_own_directory_is_written_to(mesh: Mesh) -> None:
    with mesh.context.artifacts.staging("activation_cache") as folder:
        for name in (folder.name, "../staging", "stream_0123456789abcdef"):
            call = mesh.stub.StreamActivations(request(place=name))
            assert not (await call.read()).facts.by_handle
            assert (await call.read()).block.chunk
            call.cancel()
        assert list(folder.iterdir()) == []
