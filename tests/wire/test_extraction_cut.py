"""How a dataset is cut into sequences and passes, and that every file which tells of it can be read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.kit.database import Database
from services.kit.events import EventLog
from services.residency.shards import ShardReader
from tests import models
from tests.wire.extraction_support import DATASET, MODEL, Mesh, meshing
from tests.wire.test_extraction import texts


@pytest.fixture
async def mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60), "ds_few": texts(5)}
        yield mesh


async def test_memory_that_runs_out_splits_batches_and_is_told(mesh: Mesh) -> None:
    plain = await mesh.extracted(seed=5, batch_size=16)
    model = mesh.context.residency.get(MODEL).base.model
    sizes = []

    def limited(_: Any, __: Any, kwargs: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")

    digests = [shard.digest for shard in (await mesh.cache(plain.cache_id)).shards]
    await mesh.stub.DeleteActivationCache(pb.DeleteActivationCacheRequest(id=plain.cache_id))
    handle = model.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        short = await mesh.extracted(seed=5, batch_size=16)
    finally:
        handle.remove()
    assert [shard.digest for shard in (await mesh.cache(short.cache_id)).shards] == digests
    events = await EventLog(mesh.context.database).after([f"extraction:{short.extraction_id}"], {})
    told = [event.data for event in events if event.event == "extraction:progress"]
    assert max(data["out_of_memory"] for data in told) > 0
    assert max(data["batch_size"] for data in told) < 16


async def test_rows_are_packed_and_the_bad_ones_are_told(mesh: Mesh) -> None:
    done = await mesh.extracted(dataset_id="ds_few", packing=True, special_tokens=pb.SPECIAL_TOKENS_NONE, max_length=16)
    cache = await mesh.cache(done.cache_id)
    manifest = ShardReader(mesh.folder_of(done)).manifest
    assert (manifest.dataset["packing"], manifest.dataset["special_tokens"]) == (True, "none")
    tokens = sum(len(models.tokenizer()(text)["input_ids"]) for text in texts(5))
    assert (cache.tokens, cache.truncated_tokens) == (tokens, 0)
    assert cache.samples == -(-(tokens + 5) // 16), "every row is ended by EOS, which is no row of the cache"
    assert (cache.rows_read, cache.bad_rows) == (5, 0)


async def test_every_file_of_a_cache_can_be_read(mesh: Mesh) -> None:
    done = await mesh.extracted(dataset_id="ds_few")
    for name in ("manifest.json", "sequences.safetensors", "statistics.safetensors", "shard-00000.safetensors"):
        whole = (mesh.folder_of(done) / name).read_bytes()
        for offset, length in ((0, 0), (5, 9)):
            asked = pb.ReadCacheFileRequest(id=done.cache_id, name=name, offset=offset, length=length)
            parts = [body.data async for body in mesh.stub.ReadCacheFile(asked)]
            assert b"".join(parts) == whole[offset : offset + length if length else None]
    for name in ("../manifest.json", "nothing"):
        call = mesh.stub.ReadCacheFile(pb.ReadCacheFileRequest(id=done.cache_id, name=name))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    path = mesh.folder_of(done) / "sequences.safetensors"
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    call = mesh.stub.ReadCacheFile(pb.ReadCacheFileRequest(id=done.cache_id, name=path.name))
    with pytest.raises(grpc.aio.AioRpcError, match="corrupt"):
        await call.read()
    path.write_bytes(content)
