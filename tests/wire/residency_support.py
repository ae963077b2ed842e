"""The residency part of a device process behind real gRPC, with a registry that only records what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import datasets_pb2, datasets_pb2_grpc, devices_pb2, devices_pb2_grpc
from lensmesh.residency.v1 import residency_pb2, residency_pb2_grpc
from peft import LoraConfig

from services.kit import auth
from services.kit.artifacts import ArtifactStore
from services.kit.channels import SERVER_OPTIONS, open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.interceptors import CallInterceptor
from services.kit.jobs import JobStore
from services.kit.methods import methods_of
from services.kit.metrics import RpcMetrics, new_registry
from services.kit.server import Context, Part
from services.residency.__main__ import compose
from services.residency.lenses import extension_files, lora
from services.residency.pool import Pool
from tests.support import free_port

REGISTRY = ("lensmesh.registry.v1.PlacementService", "lensmesh.registry.v1.DatasetService")
HOST = "lensmesh.residency.v1.ModelHostService"


@dataclass
class Registry(devices_pb2_grpc.PlacementServiceServicer, datasets_pb2_grpc.DatasetServiceServicer):
    """Keeps what hosts say; knows one inline dataset."""

    registrations: list[devices_pb2.RegisterHostRequest] = field(default_factory=list)
    heartbeats: list[devices_pb2.HeartbeatRequest] = field(default_factory=list)
    forgets: bool = False
    texts: list[str] = field(default_factory=list)

    async def RegisterHost(self, request: Any, context: Any) -> Any:
        self.registrations.append(request)
        return devices_pb2.RegisterHostResponse(heartbeat_seconds=0.01)

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        self.heartbeats.append(request)
        forgot, self.forgets = self.forgets, False
        return devices_pb2.HeartbeatResponse(register_again=forgot)

    async def GetDataset(self, request: Any, context: Any) -> Any:
        return datasets_pb2.Dataset(id=request.id, source=datasets_pb2.DATASET_SOURCE_INLINE)

    async def ReadInlineTexts(self, request: Any, context: Any) -> Any:
        for text in self.texts:
            yield datasets_pb2.InlineTexts(texts=[text])


@dataclass
class Host:
    stub: Any
    pool: Pool
    part: Part
    registry: Registry
    context: Context

    async def load(self, model_id: str, identifier: str, quantization: str = "NONE", **more: Any) -> list[Any]:
        """Every progress message of a load of a local model."""
        request = residency_pb2.LoadRequest(
            model_id=model_id,
            source=local(identifier),
            quantization=types_pb2.Quantization.Value(f"QUANTIZATION_{quantization}"),
            **more,
        )
        return [step async for step in self.stub.Load(request)]


def local(identifier: str) -> residency_pb2.SourceSpec:
    return residency_pb2.SourceSpec(source=types_pb2.MODEL_SOURCE_LOCAL, identifier=identifier)


@asynccontextmanager
async def serving(settings: Settings, part: list[tuple[Any, Any, str]], port: int = 0) -> AsyncIterator[str]:
    """Servicers behind the kit's rules; yields their address."""
    methods = [method for _, _, name in part for method in methods_of(name)]
    verifier = auth.TokenVerifier(
        settings.jwt_keys, settings.service_token_path, issuer=settings.jwt_issuer, audience=settings.jwt_audience
    )
    server = grpc.aio.server(
        interceptors=[CallInterceptor(methods, verifier, RpcMetrics(new_registry(), methods))], options=SERVER_OPTIONS
    )
    for add, implementation, _ in part:
        add(implementation, server)
    address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@asynccontextmanager
async def hosting(database: Database, state: Path, model_root: Path) -> AsyncIterator[Host]:
    """A composed residency process part and a stub that calls it as the mesh itself."""
    settings = Settings(state_dir=state, model_roots=[model_root])
    settings.service_token_path.parent.mkdir(parents=True)
    settings.service_token_path.write_text("t" * 40)
    registry = Registry()
    registry_part = [
        (devices_pb2_grpc.add_PlacementServiceServicer_to_server, registry, REGISTRY[0]),
        (datasets_pb2_grpc.add_DatasetServiceServicer_to_server, registry, REGISTRY[1]),
    ]
    async with (
        serving(settings, registry_part) as registry_address,
        open_channel(registry_address, settings) as to_registry,
        hosted(settings, database, to_registry) as host,
    ):
        host.registry = registry
        yield host


@asynccontextmanager
async def hosted(settings: Settings, database: Database, to_registry: grpc.aio.Channel) -> AsyncIterator[Host]:
    """The same with any registry, of which it has not been told yet."""
    port = free_port()
    context = Context(
        settings=settings,
        database=database,
        jobs=JobStore(database),
        artifacts=ArtifactStore(settings.artifact_dir),
        metrics=new_registry(),
        registry=to_registry,
        host_id="device-0",
        incarnation="incarnation-1",
        device="cpu",
        address=f"127.0.0.1:{port}",
        services=("extraction",),
    )
    part = await compose(context)
    own = [(servicer.add, servicer.implementation, servicer.name) for servicer in part.servicers]
    async with serving(settings, own, port) as address, open_channel(address, settings) as channel:
        stub = residency_pb2_grpc.ModelHostServiceStub(channel)
        yield Host(stub, context.residency, part, Registry(), context)
    for close in part.close:
        await close()


async def refused(call) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """(code, reason, metadata) of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    next(detail for detail in status.details if detail.Is(info.DESCRIPTOR)).Unpack(info)
    return caught.value.code(), info.reason, dict(info.metadata)


async def wrong_fields(call) -> list[str]:
    """Names of the fields that a call is refused for."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        detail.Unpack(bad)
    return [violation.field for violation in bad.field_violations]


async def publish(host: Host, kind: str, write) -> str:
    with host.context.artifacts.staging(kind) as folder:
        write(folder)
        async with host.context.database.transaction() as conn:
            return (await host.context.artifacts.publish(conn, kind, folder, {})).uri


def extension(base: torch.nn.Module, digest: str, seed: int):
    """Writes a LoRA extension that does something."""
    targets = lora.matched(lora.adaptable(base), ["c_attn", "mlp.c_proj"])
    make = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(tensor.shape, generator=make) * 0.05 if "lora_B" in name else tensor
        for name, tensor in lora.fresh_weights(targets, 4, seed).items()
    }
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(["c_attn", "mlp.c_proj"]))
    manifest = extension_files.Manifest(
        kind="lora",
        task_name=f"task-{seed}",
        operations=({"op": "lora"},),
        base_structure=extension_files.structure(base),
        base_digest=digest,
    )
    return lambda folder: extension_files.write(folder, manifest, weights, lora.config_json(config))
