"""Live streams from one process to another: `python -m tests.bench.streaming [--buffers N]`.

A child process serves the real ExtractionService over gRPC on loopback; its forward pass is replaced by new tensors
of the same size, so that what is measured is the way of the rows: out of the units, over files or chunks, into the
reader's memory. 1 GB/s by handle and 0.4 GB/s by chunks are asked for, and that the extractor's memory stays flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np
import torch
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc
from transformers import GPT2Config, GPT2LMHeadModel

from services.extraction import streaming
from services.extraction.adapters.places import StagedPlaces
from services.extraction.compute import Buffers, Plan, Unit
from services.extraction.domain import BaseModel, Survey
from services.extraction.ports import Tokenized
from services.extraction.servicer import ExtractionServicer
from services.kit.artifacts import ArtifactStore
from services.kit.channels import OPTIONS, SERVER_OPTIONS
from services.residency.families import facts, family_of
from services.residency.live import LiveRows
from services.residency.memory import keep_freed
from tests.bench.extraction import random_sequences

WIDTH, LENGTH, BATCH = 768, 256, 4096
BUFFER_BYTES = 256 * 2**20
ROW_BYTES = 2 * WIDTH * 4


class Ready:
    """Catalogue, models and datasets that hold one model and one dataset of random tokens."""

    def __init__(self) -> None:
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=1000, n_embd=WIDTH, n_layer=1, n_head=12, n_positions=LENGTH, **ends)
        self.model = GPT2LMHeadModel(config).eval()
        self.facts = facts(config.to_dict())
        self.family = family_of(self.model)
        self.tokenizer = None
        self.on_host, self.free_bytes = True, 2**40
        self.description = {"digest": "ready"}
        self._config = config.to_dict()
        # One unit is half a buffer; a pass has eight of them.
        count = 4 * BUFFER_BYTES // (ROW_BYTES * LENGTH)
        self._tokenized = Tokenized(random_sequences(np.full(count, LENGTH), 1000), {})

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(work, *arguments)

    async def bring(self, model_id: str) -> None:
        pass

    @asynccontextmanager
    async def lease(self, model_id: str, extension_uri: str) -> AsyncIterator[Ready]:
        yield self

    async def survey(self, *_: Any) -> Survey:
        return Survey("digest", 1, None)

    async def require_usable(self, *_: Any) -> None:
        pass

    async def tokenize(self, *_: Any) -> Tokenized:
        return self._tokenized

    async def look_up(self, model_id: str) -> BaseModel:
        return BaseModel(model_id, "gpt2", "x", "", "ready", "none", self._config, 1, WIDTH, LENGTH, 1, 8)


class Filled:
    """A unit as large as a forward pass would leave, in memory that units take over from one another, too."""

    def __init__(self, memory: Buffers, hook_points: Sequence[str], rows: int) -> None:
        self.memory = memory
        self.points = {name: memory.take((rows, WIDTH), torch.float32).fill_(0.5) for name in hook_points}
        self.tensors = self.points | {name: torch.zeros(rows, dtype=torch.int32) for name in ("tok", "seq", "pos")}

    def release(self) -> None:
        self.memory.give_back(self.points.values())


async def filled(self: Any, plan: Plan, unit: Unit) -> Filled:
    return await asyncio.to_thread(Filled, self._memory, self._options.hook_points, unit.rows)


async def serve(root: Path, tell: Connection) -> None:
    ready = Ready()
    catalogue: Any = SimpleNamespace(model=ready.look_up)
    streams = streaming.Streams(catalogue, ready, ready, StagedPlaces(root), device="cpu", most_streams=4)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    extraction_pb2_grpc.add_ExtractionServiceServicer_to_server(ExtractionServicer(None, streams), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tell.send((port, os.getpid()))
    await server.wait_for_termination()


def child(root: Path, tell: Connection) -> None:
    keep_freed()
    torch.set_num_threads(1)
    with patch.object(streaming._Rows, "_filled", filled):
        asyncio.run(serve(root, tell))


def own_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(port: int, pid: int, folder: Path | None, rows: int) -> dict[str, float]:
    """Read `rows` rows into memory of our own; bytes per second from the first batch on, and the extractor's memory."""
    wanted = pb.ExtractActivationsRequest(
        model_id="m", dataset_id="ds", layer_indices=[0], sites=["mlp_in", "mlp_out"], max_length=LENGTH
    )
    request = pb.StreamActivationsRequest(extraction=wanted, rows=rows, buffer_bytes=BUFFER_BYTES)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        live = LiveRows(extraction_pb2_grpc.ExtractionServiceStub(channel).StreamActivations, request, folder)
        kept = [torch.empty(BATCH, WIDTH) for _ in live.facts.hook_points]
        assert live.facts.by_handle == (folder is not None)
        started, first, memory = 0.0, 0, []
        for batch in live.iter_rows(BATCH):
            for own, tensor in zip(kept, batch.rows.values(), strict=True):
                own[: len(tensor)].copy_(tensor)
            if not started:
                started, first = time.perf_counter(), batch.cursor
            memory.append(own_bytes(pid))
        seconds = time.perf_counter() - started
        live.close()
    # The first two units fill the buffer; from then on it should be as large as it ever gets.
    early = max(memory[: max(1, len(memory) // 5)])
    return {
        "gb_per_second": (rows - first) * ROW_BYTES / seconds / 1e9,
        "gb": rows * ROW_BYTES / 1e9,
        "extractor_gb_in_first_fifth": early / 1e9,
        "extractor_gb_at_most": max(memory) / 1e9,
        "growth": max(memory) / early,
    }


def main() -> None:
    """Print one JSON object per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--buffers", type=int, default=10, help="how many times its buffer the extractor sends")
    rows = parser.parse_args().buffers * BUFFER_BYTES // ROW_BYTES
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        store = ArtifactStore(Path(root))
        listen, tell = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(store.root, tell), daemon=True)
        process.start()
        port, pid = listen.recv()
        with store.staging("stream") as folder:
            for way, place in (("by_handle", folder), ("by_chunks", None)):
                figures = {name: round(value, 3) for name, value in measure(port, pid, place, rows).items()}
                print(json.dumps({way: figures}), flush=True)  # noqa: T201 - the figures are what this script is for
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
