"""A device process with residency and extraction behind real gRPC, and a registry that places one model there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensmesh.common.v1 import types_pb2
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc
from lensmesh.registry.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    groups_pb2,
    groups_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

from services.extraction.__main__ import compose
from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.jobs import JobStore, Worker
from services.kit.metrics import new_registry
from services.kit.server import Context, Part
from services.residency import sources
from services.residency.__main__ import compose as compose_residency
from services.residency.families import facts
from tests import models
from tests.support import eventually
from tests.wire.residency_support import serving

MODEL, DATASET = "m_tiny", "ds_1"
MLP_PAIR = ["mlp_in", "mlp_out"]


@dataclass
class Registry(
    models_pb2_grpc.ModelServiceServicer,
    datasets_pb2_grpc.DatasetServiceServicer,
    groups_pb2_grpc.GroupServiceServicer,
    devices_pb2_grpc.PlacementServiceServicer,
):
    """One registered model in one quantization, datasets, and a host that it loads the model into."""

    folder: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    groups: list[groups_pb2.Group] = field(default_factory=list)
    pool: Any = None
    quantization: str = "none"
    loads: int = 0

    async def GetModel(self, request: Any, context: Any) -> Any:
        if request.id != MODEL:
            raise errors.NotFound(reason="MODEL_NOT_FOUND")
        config = json.loads((self.folder / "config.json").read_text())
        model = models_pb2.Model(
            id=MODEL,
            model_type=config["model_type"],
            source=types_pb2.MODEL_SOURCE_LOCAL,
            model_identifier=self.folder.name,
            digest=sources.digest(self.folder),
            quantization=types_pb2.Quantization.Value(f"QUANTIZATION_{self.quantization.upper()}"),
            num_layers=facts(config).num_layers,
            hidden_size=models.WIDTH,
            context_length=models.CONTEXT,
            parameter_count=300_000,
            defaults=types_pb2.ModelDefaults(model_batch_size=4),
        )
        model.config.update(config)
        if any(resident.model_id == MODEL for resident in self.pool.residents):
            model.status = models_pb2.MODEL_STATUS_READY
        return model

    async def GetDataset(self, request: Any, context: Any) -> Any:
        if request.id in self.files:
            name = self.files[request.id]
            return datasets_pb2.Dataset(id=request.id, source=datasets_pb2.DATASET_SOURCE_LOCAL, identifier=name)
        if request.id not in self.texts:
            raise errors.NotFound
        size = sum(map(len, self.texts[request.id]))
        return datasets_pb2.Dataset(id=request.id, source=datasets_pb2.DATASET_SOURCE_INLINE, size_bytes=size)

    async def ReadInlineTexts(self, request: Any, context: Any) -> Any:
        yield datasets_pb2.InlineTexts(texts=self.texts[request.id])

    async def ListGroups(self, request: Any, context: Any) -> Any:
        return groups_pb2.ListGroupsResponse(groups=self.groups)

    async def RegisterHost(self, request: Any, context: Any) -> Any:
        return devices_pb2.RegisterHostResponse(heartbeat_seconds=5)

    async def EnsureResident(self, request: Any, context: Any) -> Any:
        self.loads += 1
        await self.pool.load(MODEL, self.folder, self.quantization)
        return devices_pb2.ModelLocation(model_id=MODEL, host_id=request.host_id, device="cpu")


@dataclass
class Mesh:
    """What a test talks to."""

    stub: extraction_pb2_grpc.ExtractionServiceStub
    registry: Registry
    context: Context
    part: Part
    settings: Settings
    address: str

    @asynccontextmanager
    async def working(self, incarnation: str = "w1", slots: int = 2) -> AsyncIterator[Worker]:
        """A worker of this process, for the length of the block."""
        worker = Worker(
            self.context.jobs,
            self.part.handlers,
            device="cpu",
            incarnation=incarnation,
            limits=self.part.limits,
            slots=slots,
            drain_seconds=20.0,
        )
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """What the service does unasked, for the length of the block."""
        tasks = [asyncio.create_task(start()) for start in self.part.background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def extract(self, **changes: Any) -> pb.ExtractActivationsResponse:
        """Ask for the MLP pairs of two layers of the dataset, or for something else."""
        wanted = {"model_id": MODEL, "dataset_id": DATASET, "layer_indices": [1, 3], "sites": MLP_PAIR}
        wanted = {name: value for name, value in (wanted | changes).items() if value is not None}
        return await self.stub.ExtractActivations(pb.ExtractActivationsRequest(**wanted))

    async def get(self, extraction_id: str) -> pb.Extraction:
        return await self.stub.GetExtraction(pb.GetExtractionRequest(id=extraction_id))

    async def ended(self, extraction_id: str) -> pb.Extraction:
        """The extraction once it has completed, failed or was cancelled, and its job says so too."""

        async def done() -> pb.Extraction | None:
            job_id = (await self.get(extraction_id)).job_id
            ended = not job_id or (await self.context.jobs.get(job_id)).ended
            return await self.get(extraction_id) if ended else None

        return await eventually(done, timeout=60, interval=0.05)

    async def extracted(self, **changes: Any) -> pb.Extraction:
        """Ask, work, and hand out the completed extraction."""
        async with self.working():
            found = await self.ended((await self.extract(**changes)).extraction_id)
        assert found.status == pb.EXTRACTION_STATUS_COMPLETED, found
        return found

    async def cache(self, cache_id: str) -> pb.ActivationCache:
        return await self.stub.GetActivationCache(pb.GetActivationCacheRequest(id=cache_id))

    def folder_of(self, cache: pb.ActivationCache | pb.Extraction) -> Path:
        return self.context.artifacts.path(cache.storage_uri)

    def unfinished(self) -> list[str]:
        """Whatever lies beside published artifacts."""
        root = self.context.artifacts.root
        return [path.name for place in (".extractions", ".staging") for path in (root / place).glob("*")]


@asynccontextmanager
async def meshing(
    database: Database, state: Path, *, lease_seconds: float = 5.0, incarnation: str = "incarnation-1"
) -> AsyncIterator[Mesh]:
    """Registry, residency and extraction; the stub calls as the mesh itself."""
    folder = models.saved("gpt2")
    shared = Settings(state_dir=state, model_roots=[folder.parent], dataset_roots=[state / "data"])
    shared.service_token_path.parent.mkdir(parents=True, exist_ok=True)
    if not shared.service_token_path.exists():  # another process of the same state reads it
        shared.service_token_path.write_text("t" * 40)
    registry = Registry(folder)
    parts = [
        (models_pb2_grpc.add_ModelServiceServicer_to_server, registry, "lensmesh.registry.v1.ModelService"),
        (datasets_pb2_grpc.add_DatasetServiceServicer_to_server, registry, "lensmesh.registry.v1.DatasetService"),
        (groups_pb2_grpc.add_GroupServiceServicer_to_server, registry, "lensmesh.registry.v1.GroupService"),
        (devices_pb2_grpc.add_PlacementServiceServicer_to_server, registry, "lensmesh.registry.v1.PlacementService"),
    ]
    async with AsyncExitStack() as stack:
        registry_address = await stack.enter_async_context(serving(shared, parts))
        context = Context(
            settings=shared,
            database=database,
            jobs=JobStore(database, lease_seconds=lease_seconds, backoff_seconds=0.01),
            artifacts=ArtifactStore(shared.artifact_dir),
            metrics=new_registry(),
            registry=await stack.enter_async_context(open_channel(registry_address, shared)),
            host_id="device-0",
            incarnation=incarnation,
            device="cpu",
            address="",
            services=("extraction",),
        )
        residency, part = await compose_residency(context), await compose(context)
        registry.pool = context.residency
        for close in (*residency.close, *part.close):
            stack.push_async_callback(close)
        own = [(s.add, s.implementation, s.name) for s in (*residency.servicers, *part.servicers)]
        address = await stack.enter_async_context(serving(shared, own))
        context.address = address
        channel = await stack.enter_async_context(open_channel(address, shared))
        yield Mesh(extraction_pb2_grpc.ExtractionServiceStub(channel), registry, context, part, shared, address)
