"""A device process with residency and extensions behind real gRPC, and a registry that places one model there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from lensmesh.common.v1 import types_pb2
from lensmesh.extensions.v1 import extensions_pb2_grpc
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
from lensmesh.residency.v1 import residency_pb2, residency_pb2_grpc

from services.extensions.__main__ import compose
from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.jobs import JobStore, Worker
from services.kit.metrics import new_registry
from services.kit.server import Context, Part
from services.residency.__main__ import compose as compose_residency
from tests.wire.residency_support import local, serving

MODEL = "m_tiny"


@dataclass
class Registry(
    models_pb2_grpc.ModelServiceServicer,
    datasets_pb2_grpc.DatasetServiceServicer,
    groups_pb2_grpc.GroupServiceServicer,
    devices_pb2_grpc.PlacementServiceServicer,
):
    """One registered model, inline datasets, and a ledger that only remembers."""

    config: dict[str, Any]
    parameter_count: int
    texts: dict[str, list[str]] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    reserved: list[str] = field(default_factory=list)
    groups: list[groups_pb2.Group] = field(default_factory=list)
    address: str = ""
    host: Any = None
    resident: bool = False
    family: str = "gpt2"
    targets: bool = False
    registered: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    async def GetModel(self, request: Any, context: Any) -> Any:
        if request.id != MODEL:
            raise errors.NotFound(reason="MODEL_NOT_FOUND")
        model = models_pb2.Model(
            id=MODEL, name="tiny", model_type=self.family, parameter_count=self.parameter_count,
            quantization=types_pb2.QUANTIZATION_NONE, digest=self.digest,
        )  # fmt: skip
        model.config.update(self.config)
        return model

    async def CreateModel(self, request: Any, context: Any) -> Any:
        self.registered[request.model_identifier] = request
        return models_pb2.Model(id=f"m_{request.model_identifier[:8]}", name=request.name)

    async def GetDataset(self, request: Any, context: Any) -> Any:
        if request.id not in self.texts:
            raise errors.NotFound
        return datasets_pb2.Dataset(
            id=request.id,
            source=datasets_pb2.DATASET_SOURCE_INLINE if not self.targets else datasets_pb2.DATASET_SOURCE_LOCAL,
            identifier="pairs.jsonl" if self.targets else "",
            prompt_field="question" if self.targets else "",
            target_field="answer" if self.targets else "",
        )

    async def ReadInlineTexts(self, request: Any, context: Any) -> Any:
        for text in self.texts[request.id]:
            yield datasets_pb2.InlineTexts(texts=[text])

    async def ListGroups(self, request: Any, context: Any) -> Any:
        return groups_pb2.ListGroupsResponse(groups=self.groups)

    async def RegisterHost(self, request: Any, context: Any) -> Any:
        return devices_pb2.RegisterHostResponse(heartbeat_seconds=5)

    async def EnsureResident(self, request: Any, context: Any) -> Any:
        load = residency_pb2.LoadRequest(
            model_id=MODEL, source=local(self.family), quantization=types_pb2.QUANTIZATION_NONE
        )
        async for _ in self.host.Load(load):
            pass
        self.resident = True
        return devices_pb2.ModelLocation(model_id=MODEL, host_id=request.host_id, address=self.address, device="cpu")

    async def LocateModel(self, request: Any, context: Any) -> Any:
        if not self.resident:
            raise errors.Conflict("not loaded")
        return devices_pb2.ModelLocation(model_id=MODEL, address=self.address)

    async def Reserve(self, request: Any, context: Any) -> Any:
        self.ledger[request.owner] = request.bytes
        self.reserved.append(request.owner)
        devices = ["cpu"] * (request.ranks or 1)
        return devices_pb2.Reservation(owner=request.owner, bytes=request.bytes, devices=devices)

    async def Release(self, request: Any, context: Any) -> Any:
        self.ledger.pop(request.owner, None)
        return empty_pb2.Empty()

    async def SwitchExtension(self, request: Any, context: Any) -> Any:
        if request.extension_id:
            lens = types_pb2.LensSpec(
                lens_id=request.extension_id, kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=request.artifact_uri,
                base_digest=request.base_digest,
            )  # fmt: skip
            await self.host.AttachLens(residency_pb2.AttachLensRequest(model_id=MODEL, lens=lens))
        switch = residency_pb2.SwitchLensRequest(model_id=MODEL, lens_id=request.extension_id or None)
        done = await self.host.SwitchLens(switch)
        return devices_pb2.SwitchExtensionResponse(
            seconds=done.seconds,
            memory_before_bytes=done.memory_before_bytes,
            memory_after_bytes=done.memory_after_bytes,
            active_extension_id=request.extension_id,
        )


@dataclass
class Mesh:
    """What a test talks to."""

    stub: extensions_pb2_grpc.ExtensionServiceStub
    host: residency_pb2_grpc.ModelHostServiceStub
    registry: Registry
    context: Context
    part: Part

    def worker(self, incarnation: str = "w1") -> Worker:
        """A worker of this process; run it in the test."""
        return Worker(
            self.context.jobs,
            self.part.handlers,
            device="cpu",
            incarnation=incarnation,
            limits=self.part.limits,
            slots=2,
            drain_seconds=20.0,
        )


@asynccontextmanager
async def meshing(database: Database, state: Path, model_root: Path, **settings: Any) -> AsyncIterator[Mesh]:
    """Registry, residency and extensions; the stub calls as the mesh itself."""
    family = settings.pop("family", "gpt2")
    shared = Settings(state_dir=state, model_roots=[model_root], dataset_roots=[model_root])
    shared.service_token_path.parent.mkdir(parents=True, exist_ok=True)
    shared.service_token_path.write_text("t" * 40)
    config = json.loads((model_root / family / "config.json").read_text())
    registry = Registry(config, parameter_count=123_456, family=family)
    parts = [
        (models_pb2_grpc.add_ModelServiceServicer_to_server, registry, "lensmesh.registry.v1.ModelService"),
        (datasets_pb2_grpc.add_DatasetServiceServicer_to_server, registry, "lensmesh.registry.v1.DatasetService"),
        (groups_pb2_grpc.add_GroupServiceServicer_to_server, registry, "lensmesh.registry.v1.GroupService"),
        (devices_pb2_grpc.add_PlacementServiceServicer_to_server, registry, "lensmesh.registry.v1.PlacementService"),
    ]
    async with AsyncExitStack() as stack:
        to_registry: grpc.aio.Channel = await stack.enter_async_context(
            open_channel(await stack.enter_async_context(serving(shared, parts)), shared)
        )
        context = Context(
            settings=shared,
            database=database,
            jobs=JobStore(database, lease_seconds=5.0, backoff_seconds=0.01),
            artifacts=ArtifactStore(shared.artifact_dir),
            metrics=new_registry(),
            registry=to_registry,
            host_id="device-0",
            incarnation="incarnation-1",
            device="cpu",
            address="",
            services=("extensions",),
        )
        residency, part = await compose_residency(context), await compose(context)
        for close in (*residency.close, *part.close):
            stack.push_async_callback(close)
        own = [(s.add, s.implementation, s.name) for s in (*residency.servicers, *part.servicers)]
        registry.address = await stack.enter_async_context(serving(shared, own))
        channel = await stack.enter_async_context(open_channel(registry.address, shared))
        registry.host = residency_pb2_grpc.ModelHostServiceStub(channel)
        stub = extensions_pb2_grpc.ExtensionServiceStub(channel)
        yield Mesh(stub, registry.host, registry, context, part)
