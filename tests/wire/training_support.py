"""A device process with residency, extraction and training behind real gRPC, and a registry that only remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import empty_pb2
from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc
from lensmesh.registry.v1 import (
    datasets_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    groups_pb2_grpc,
    models_pb2_grpc,
)
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1 import training_pb2_grpc, transcoders_pb2_grpc
from torch import Tensor

from services.extraction.__main__ import compose as compose_extraction
from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.jobs import JobStore, Worker
from services.kit.metrics import new_registry
from services.kit.server import Context, Part
from services.residency.__main__ import compose as compose_residency
from services.residency.lenses.transcoder import Transcoder
from services.training.__main__ import compose
from tests import models
from tests.support import eventually
from tests.wire import extraction_support
from tests.wire.extraction_support import DATASET, MODEL
from tests.wire.residency_support import serving

HELD_OUT = "ds_held_out"
STEPS = 60
BATCH = 64


@dataclass
class Registry(extraction_support.Registry):
    """Also a ledger."""

    address: str = ""
    budget: int = 10**9
    ledger: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def EnsureResident(self, request: Any, context: Any) -> Any:
        async with self.loading:
            location = await super().EnsureResident(request, context)
        location.address = self.address
        return location

    async def LocateModel(self, request: Any, context: Any) -> Any:
        if request.model_id not in [resident.model_id for resident in self.pool.residents]:
            raise errors.Conflict
        return devices_pb2.ModelLocation(model_id=request.model_id, host_id="device-0", address=self.address)

    async def Reserve(self, request: Any, context: Any) -> Any:
        if request.bytes > self.budget:
            raise errors.Exhausted(reason="INSUFFICIENT_MEMORY", metadata={"required_memory_gb": request.bytes / 1e9})
        ranks = request.ranks or 1
        self.ledger[request.owner] = self.reserved[request.owner] = ranks * request.bytes
        return devices_pb2.Reservation(owner=request.owner, bytes=request.bytes, devices=["cpu"] * ranks)

    async def Release(self, request: Any, context: Any) -> Any:
        self.ledger.pop(request.owner, None)
        return empty_pb2.Empty()


@dataclass
class Mesh:
    """What a test talks to."""

    stub: training_pb2_grpc.TrainingServiceStub
    transcoders: transcoders_pb2_grpc.TranscoderServiceStub
    extraction: extraction_pb2_grpc.ExtractionServiceStub
    registry: Registry
    context: Context
    parts: list[Part]

    @asynccontextmanager
    async def working(self, incarnation: str = "w1", slots: int = 4) -> AsyncIterator[Worker]:
        """A worker of this process, for the length of the block."""
        worker = Worker(
            self.context.jobs,
            {kind: handler for part in self.parts for kind, handler in part.handlers.items()},
            device="cpu",
            incarnation=incarnation,
            limits={kind: limit for part in self.parts for kind, limit in part.limits.items()},
            slots=slots,
            drain_seconds=30.0,
        )
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def cache(self) -> extraction_pb2.Extraction:
        """The MLP pairs of layers 1 and 3 of the dataset, extracted once."""
        request = extraction_pb2.ExtractActivationsRequest(
            model_id=MODEL, dataset_id=DATASET, layer_indices=[1, 3], sites=["mlp_in", "mlp_out"]
        )
        started = await self.extraction.ExtractActivations(request)
        wanted = extraction_pb2.GetExtractionRequest(id=started.extraction_id)

        async def done() -> Any:
            found = await self.extraction.GetExtraction(wanted)
            return found if found.status == extraction_pb2.EXTRACTION_STATUS_COMPLETED else None

        return await eventually(done, timeout=60)

    async def create(self, **changes: Any) -> pb.TrainingJob:
        """Ask for a small training of layers 1 and 3, or for something else."""
        wanted = {
            "model_id": MODEL,
            "layers": [1, 3],
            "source": {"dataset_id": DATASET},
            "dict_size": 256,
            "top_k": 8,
            "batch_size": BATCH,
            "num_tokens": STEPS * BATCH,
        }
        wanted = {name: value for name, value in (wanted | changes).items() if value is not None}
        return await self.stub.CreateTrainingJob(pb.CreateTrainingJobRequest(**wanted))

    async def get(self, job_id: str) -> pb.TrainingJob:
        return await self.stub.GetTrainingJob(pb.GetTrainingJobRequest(id=job_id))

    async def reached(self, job_id: str, *states: int, timeout: float = 90) -> pb.TrainingJob:
        """The training once it is in one of these states."""

        async def there() -> pb.TrainingJob | None:
            found = await self.get(job_id)
            return found if found.status in states else None

        return await eventually(there, timeout=timeout)

    async def trained(self, **changes: Any) -> pb.TrainingJob:
        """Ask, work, and hand out the completed training."""
        async with self.working():
            job = await self.create(**changes)
            found = await self.reached(job.id, pb.TRAINING_STATUS_COMPLETED, pb.TRAINING_STATUS_FAILED)
        assert found.status == pb.TRAINING_STATUS_COMPLETED, found
        return found

    async def transcoder(self, transcoder_id: str) -> pb.Transcoder:
        return await self.stub.GetTranscoder(pb.GetTranscoderRequest(id=transcoder_id))

    async def weights(self, transcoder_id: str) -> dict[str, Tensor]:
        """A transcoder's tensors by name."""
        found = Transcoder.load(self.folder((await self.transcoder(transcoder_id)).artifact_uri)).state_dict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    async def cache_folder(self, cache_id: str) -> Path:
        wanted = extraction_pb2.GetActivationCacheRequest(id=cache_id)
        return self.folder((await self.extraction.GetActivationCache(wanted)).storage_uri)

    async def has_checkpoint(self, job_id: str) -> bool:
        return len((await self.get(job_id)).checkpoints) > 0

    def folder(self, uri: str) -> Path:
        return self.context.artifacts.path(uri)

    def staged(self) -> list[str]:
        """Whatever lies half done beside published artifacts."""
        return [path.name for path in (self.context.artifacts.root / ".staging").glob("*")]


@asynccontextmanager
async def meshing(database: Database, state: Path, *, lease_seconds: float = 10.0) -> AsyncIterator[Mesh]:
    """Registry, residency, extraction and training; the stubs call as the mesh itself."""
    shared = Settings(state_dir=state)
    shared.service_token_path.parent.mkdir(parents=True, exist_ok=True)
    shared.service_token_path.write_text("t" * 40)
    registry = Registry(models.saved("gpt2"))
    registry_parts = [
        (models_pb2_grpc.add_ModelServiceServicer_to_server, registry, "lensmesh.registry.v1.ModelService"),
        (datasets_pb2_grpc.add_DatasetServiceServicer_to_server, registry, "lensmesh.registry.v1.DatasetService"),
        (groups_pb2_grpc.add_GroupServiceServicer_to_server, registry, "lensmesh.registry.v1.GroupService"),
        (devices_pb2_grpc.add_PlacementServiceServicer_to_server, registry, "lensmesh.registry.v1.PlacementService"),
    ]
    async with AsyncExitStack() as stack:
        registry_address = await stack.enter_async_context(serving(shared, registry_parts))
        context = Context(
            settings=shared,
            database=database,
            jobs=JobStore(database, lease_seconds=lease_seconds, backoff_seconds=0.01),
            artifacts=ArtifactStore(shared.artifact_dir),
            metrics=new_registry(),
            registry=await stack.enter_async_context(open_channel(registry_address, shared)),
            host_id="device-0",
            incarnation="incarnation-1",
            device="cpu",
            address="",
            services=("extraction", "training"),
        )
        parts = [await compose_residency(context), await compose_extraction(context)]
        registry.pool = context.residency
        registry.address = context.address = await _serve(stack, shared, parts)
        parts.append(await compose(context))
        for part in parts:
            for close in part.close:
                stack.push_async_callback(close)
        to_extraction = await stack.enter_async_context(open_channel(context.address, shared))
        to_training = await stack.enter_async_context(open_channel(await _serve(stack, shared, parts[2:]), shared))
        yield Mesh(
            training_pb2_grpc.TrainingServiceStub(to_training),
            transcoders_pb2_grpc.TranscoderServiceStub(to_training),
            extraction_pb2_grpc.ExtractionServiceStub(to_extraction),
            registry,
            context,
            parts,
        )


async def _serve(stack: AsyncExitStack, settings: Settings, parts: list[Part]) -> str:
    servicers = [(s.add, s.implementation, s.name) for part in parts for s in part.servicers]
    return await stack.enter_async_context(serving(settings, servicers))
