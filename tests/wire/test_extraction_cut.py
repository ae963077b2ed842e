"""How a dataset is cut into sequences and passes, and that every file which tells of it can be read."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction.adapters import peers
from services.extraction.adapters.files import WorkFolder
from services.extraction.compute import UnitFiller
from services.kit.database import Database
from services.kit.events import EventLog
from services.residency.shards import ShardReader
from services.residency.texts import tokenize
from tests import models
from tests.wire.extraction_support import DATASET, MODEL, Mesh, meshing
from tests.wire.test_extraction import texts


@pytest.fixture
async def mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(30), "ds_few": texts(5)}
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


async def test_a_pair_that_is_none_fails_the_job_with_the_errors_size(mesh: Mesh) -> None:
    await mesh.registry.pool.load(MODEL, mesh.registry.folder, "none")
    calls = itertools.count()
    mlp = mesh.context.residency.get(MODEL).base.model.transformer.h[3].mlp
    handle = mlp.register_forward_hook(lambda _, __, output: output * (1 + 0.01 * next(calls)))
    async with mesh.working():
        failed = await mesh.ended((await mesh.extract()).extraction_id)
    handle.remove()
    assert (failed.status, failed.error_code) == (pb.EXTRACTION_STATUS_FAILED, "HOOK_IDENTITY_FAILED")
    assert re.search(r"layer 3: .* by 0\.0\d+ ", failed.error_message), failed.error_message
    assert mesh.unfinished() == []


async def test_a_dataset_is_tokenised_once_for_all_extractions_that_cut_it_alike(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = []

    def counted(*arguments: Any, **options: Any) -> Any:
        cut.append(arguments[2])
        return tokenize(*arguments, **options)

    monkeypatch.setattr(peers, "tokenize", counted)
    for changes in ({}, {"layer_indices": [0]}, {"seed": 1}):
        await mesh.extracted(dataset_id="ds_few", **changes)
    assert len(cut) == 1
    await mesh.extracted(dataset_id="ds_few", packing=True)
    assert [encoding.packing for encoding in cut] == [False, True]


async def test_a_unit_is_written_while_the_next_one_is_computed_and_no_further(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write ends once the second unit was computed, so that without an overlap nothing would ever end."""
    computed, written = threading.Event(), []
    moments, write = UnitFiller.moments, WorkFolder.write

    def noted(self: UnitFiller) -> Any:
        assert self.unit.index <= len(written) + 1, "one unit waits to be written at most"
        if self.unit.index == 1:
            computed.set()
        return moments(self)

    def waiting(self: WorkFolder, unit: int, *arguments: Any) -> Any:
        assert computed.wait(30)
        entry = write(self, unit, *arguments)
        written.append(unit)
        return entry

    monkeypatch.setattr(UnitFiller, "moments", noted)
    monkeypatch.setattr(WorkFolder, "write", waiting)
    mesh.registry.texts[DATASET] = texts(64 * 3)
    await mesh.extracted()
    assert written == [0, 1, 2]


async def test_rows_are_packed_and_the_bad_ones_are_told(mesh: Mesh) -> None:
    done = await mesh.extracted(dataset_id="ds_few", packing=True, special_tokens=pb.SPECIAL_TOKENS_NONE, max_length=16)
    cache = await mesh.cache(done.cache_id)
    manifest = ShardReader(mesh.folder_of(done)).manifest
    assert (manifest.dataset["packing"], manifest.dataset["special_tokens"]) == (True, "none")
    tokens = sum(len(models.tokenizer()(text)["input_ids"]) for text in texts(5))
    assert (cache.tokens, cache.truncated_tokens) == (tokens, 0)
    assert cache.samples == -(-(tokens + 5) // 16), "every row is ended by EOS, which is no row of the cache"
    assert (cache.rows_read, cache.bad_rows) == (5, 0)


async def test_of_an_encoder_decoder_the_encoder_is_read(mesh: Mesh) -> None:
    mesh.registry.folder = models.saved("t5")
    done = await mesh.extracted(dataset_id="ds_few")
    assert done.identity_error == 0.0
    shard = ShardReader(mesh.folder_of(done)).shard(0)
    mlp = models.tiny("t5").encoder.block[3].layer[1].DenseReluDense
    x, y = shard["blocks.3.mlp.hook_in"], shard["blocks.3.hook_mlp_out"]
    torch.testing.assert_close(mlp(x), y, rtol=1e-5, atol=1e-5)
    assert len(x) == sum(len(models.tokenizer()(text)["input_ids"]) for text in texts(5))


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
