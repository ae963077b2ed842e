"""The whole registry behind real gRPC and PostgreSQL, and hosts that pretend to hold models: no torch anywhere."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from joserfc.jwk import KeySet, OctKey
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.extensions.v1 import extensions_pb2_grpc
from lensmesh.extraction.v1 import extraction_pb2_grpc
from lensmesh.registry.v1 import (
    datasets_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    groups_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from lensmesh.residency.v1 import residency_pb2_grpc
from lensmesh.training.v1 import training_pb2_grpc

from services.kit import audit, auth
from services.kit.artifacts import ArtifactStore
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.interceptors import CallInterceptor
from services.kit.jobs import JobStore, Worker
from services.kit.methods import methods_of
from services.kit.metrics import RpcMetrics, new_registry
from services.kit.server import Context, Part
from services.registry.__main__ import compose
from tests.support import eventually
from tests.wire.registry_host import MB, FakeHost

__all__ = ["MB", "FakeHost", "Mesh", "refused", "running"]
PATIENCE = "45"
"""Seconds after which a host counts as lost: fake ones have no heartbeat, and a busy machine may need that long."""
PEERS = (
    "lensmesh.residency.v1.ModelHostService",
    "lensmesh.training.v1.TrainingService",
    "lensmesh.extensions.v1.ExtensionService",
    "lensmesh.extraction.v1.ExtractionService",
)


@dataclass
class Mesh:
    """A registry and what tests need to talk to it."""

    address: str
    settings: Settings
    database: Database
    context: Context
    stack: AsyncExitStack
    part: Part
    channel: grpc.aio.Channel = field(init=False)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    """What the process runs in the background, its worker last."""
    worker: Worker | None = None
    hosts: dict[str, tuple[FakeHost, grpc.aio.Server]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """`mesh.models`, `mesh.placement`, …: stubs that call as a user, the placement as the mesh."""
        modules = {
            "models": models_pb2_grpc.ModelServiceStub,
            "groups": groups_pb2_grpc.GroupServiceStub,
            "datasets": datasets_pb2_grpc.DatasetServiceStub,
            "devices": devices_pb2_grpc.DeviceServiceStub,
            "jobs": jobs_pb2_grpc.JobServiceStub,
            "events_stub": jobs_pb2_grpc.EventServiceStub,
        }
        if name == "placement":
            return devices_pb2_grpc.PlacementServiceStub(self.internal)
        if name in modules:
            return modules[name](self.as_user("ada"))
        raise AttributeError(name)

    def as_user(self, subject: str, *permissions: str, **claims: Any) -> grpc.aio.Channel:
        """A channel with a user's token, with all scopes but admin when none are named."""
        key = (subject, permissions, tuple(claims.items()))
        if key not in self._channels:
            token = auth.mint(
                self.settings.jwt_keys,
                subject=subject,
                permissions=list(permissions or ("model:read", "model:write")),
                issuer="lensmesh",
                audience="lensmesh",
                lifetime_seconds=3600,
                **claims,
            )
            self._channels[key] = grpc.aio.insecure_channel(
                self.address, interceptors=[_Token(token), _StreamToken(token)]
            )
        return self._channels[key]

    def __post_init__(self) -> None:
        self._channels: dict[Any, grpc.aio.Channel] = {}
        self.internal = open_channel(self.address, self.settings)

    def asked_for(self, method: str) -> float:
        """How many calls of a method of groups have come so far."""
        labels = {"grpc_type": "unary", "grpc_service": "lensmesh.registry.v1.GroupService", "grpc_method": method}
        return self.context.metrics.get_sample_value("grpc_server_started_total", labels) or 0.0

    async def add_host(self, host: FakeHost, *, announce: bool = True) -> FakeHost:
        """Serve a fake host, and announce it."""
        server, host.address = await _serve(
            self.settings,
            [
                (residency_pb2_grpc.add_ModelHostServiceServicer_to_server, host),
                (training_pb2_grpc.add_TrainingServiceServicer_to_server, host),
                (extensions_pb2_grpc.add_ExtensionServiceServicer_to_server, host),
                (extraction_pb2_grpc.add_ExtractionServiceServicer_to_server, host),
            ],
            PEERS,
        )
        self.hosts[host.host_id] = (host, server)
        if announce:
            await self.announce(host)
        return host

    async def stop_host(self, host: FakeHost) -> None:
        """It answers no more."""
        _, server = self.hosts.pop(host.host_id)
        await server.stop(None)

    async def announce(self, host: FakeHost) -> None:
        await self.placement.RegisterHost(
            devices_pb2.RegisterHostRequest(
                host_id=host.host_id,
                incarnation=host.incarnation,
                address=host.address,
                device=host.device,
                kind="fake",
                total_bytes=2 * host.budget,
                budget_bytes=host.budget,
                park_bytes=host.park,
                services=host.services,
                models=host.held.values(),
                accelerator=host.accelerator,
            )
        )

    async def beat(self, host: FakeHost) -> bool:
        """One heartbeat; whether the registry wants a new registration."""
        request = devices_pb2.HeartbeatRequest(
            host_id=host.host_id, incarnation=host.incarnation, models=host.held.values(), used_bytes=1
        )
        return (await self.placement.Heartbeat(request)).register_again

    async def create(self, identifier: str = "tiny", **more: Any) -> models_pb2.Model:
        request = {"name": identifier, "source": types.MODEL_SOURCE_LOCAL, "model_identifier": identifier, **more}
        return await self.models.CreateModel(models_pb2.CreateModelRequest(**request))

    async def get(self, model_id: str) -> models_pb2.Model:
        return await self.models.GetModel(models_pb2.GetModelRequest(id=model_id))

    async def load(self, model_id: str, **more: Any) -> models_pb2.LoadModelResponse:
        return await self.models.LoadModel(models_pb2.LoadModelRequest(id=model_id, **more))

    async def ready(self, identifier: str = "tiny", **more: Any) -> models_pb2.Model:
        """A model that is on a device."""
        model = await self.create(identifier, **more)
        await self.load(model.id)
        return await self.reaches(model.id, models_pb2.MODEL_STATUS_READY)

    async def reaches(self, model_id: str, status: int) -> models_pb2.Model:
        async def check() -> models_pb2.Model | None:
            model = await self.get(model_id)
            return model if model.status == status else None

        return await eventually(check)

    async def settled(self, job_id: str) -> jobs_pb2.Job:
        """The job when nothing happens to it any more."""

        async def check() -> jobs_pb2.Job | None:
            job = await self.jobs.GetJob(jobs_pb2.GetJobRequest(id=job_id))
            return job if jobs_pb2.JobState.Name(job.status)[10:] in ("COMPLETED", "FAILED", "CANCELLED") else None

        return await eventually(check)

    async def cancel(self, job_id: str) -> None:
        """Cancel a job that runs, and wait until its handler could know it."""
        await self.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=job_id))
        assert self.worker is not None
        claims = self.worker._running
        await eventually(lambda: job_id not in claims or claims[job_id].stopping)

    async def device(self, host_id: str = "device-0") -> devices_pb2.Device:
        found = await self.devices.ListDevices(devices_pb2.ListDevicesRequest())
        return next(device for device in found.devices if device.host_id == host_id)

    async def ledger(self, host_id: str = "device-0") -> tuple[int, int]:
        """Used and reserved bytes."""
        device = await self.device(host_id)
        return device.used_bytes, device.reserved_bytes

    async def events(self, resource_id: str) -> list[tuple[str, dict[str, Any]]]:
        """Every event of a resource so far, its sequences checked."""
        async with self.database.connection() as conn:
            rows = await conn.fetch(
                "SELECT topic, sequence, event, data FROM events WHERE resource_id = $1 ORDER BY sequence", resource_id
            )
        assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
        return [(row["event"], row["data"]) for row in rows]


@asynccontextmanager
async def running(
    database: Database, state: Path, nats_url: str, *, worker: bool = True, lease_seconds: float = 30.0
) -> AsyncIterator[Mesh]:
    """A whole registry process, in this one."""
    settings = Settings(state_dir=state, nats_url=nats_url, dataset_roots=[state / "datasets"])
    if not settings.jwt_keys.exists():
        settings.jwt_keys.parent.mkdir(parents=True)
        settings.jwt_keys.write_text(json.dumps(KeySet([OctKey.generate_key(256)]).as_dict(private=True)))
        settings.service_token_path.write_text("t" * 40)
    jobs = JobStore(database, lease_seconds=lease_seconds, backoff_seconds=0.02)
    context = Context(
        settings=settings,
        database=database,
        jobs=jobs,
        artifacts=ArtifactStore(settings.artifact_dir),
        metrics=new_registry(),
        registry=None,
        host_id="registry",
        incarnation=f"registry-{id(settings)}",
        device="",
        address="",
        services=("registry",),
    )
    async with AsyncExitStack() as stack:
        with patch.dict(os.environ, {"LENSMESH_HOST_TIMEOUT": PATIENCE, **os.environ}):
            part = await compose(context)
        for close in part.close:
            stack.push_async_callback(close)
        own = [(servicer.add, servicer.implementation) for servicer in part.servicers]
        server, address = await _serve(settings, own, tuple(s.name for s in part.servicers), context)
        mesh = Mesh(address, settings, database, context, stack, part)
        stack.push_async_callback(server.stop, None)
        tasks = mesh.tasks
        tasks += [asyncio.create_task(task()) for task in part.background]
        if worker:
            mesh.worker = Worker(
                jobs,
                part.handlers,
                device="",
                incarnation=context.incarnation,
                limits=part.limits,
                slots=part.slots,
                drain_seconds=1.0,
            )
            tasks.append(asyncio.create_task(mesh.worker.run()))
        try:
            yield mesh
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for _, host_server in mesh.hosts.values():
                await host_server.stop(None)
            for channel in (mesh.internal, *mesh._channels.values()):
                await channel.close()


async def _serve(
    settings: Settings, servicers: list[tuple[Any, Any]], names: tuple[str, ...], context: Context | None = None
) -> tuple[grpc.aio.Server, str]:
    methods = [method for name in names for method in methods_of(name)]
    verifier = auth.TokenVerifier(
        settings.jwt_keys, settings.service_token_path, issuer=settings.jwt_issuer, audience=settings.jwt_audience
    )
    record = None if context is None else audit.AuditLog(context.database).record
    rpcs = RpcMetrics(new_registry() if context is None else context.metrics, methods)
    interceptor = CallInterceptor(methods, verifier, rpcs, record)
    server = grpc.aio.server(interceptors=[interceptor])
    for add, implementation in servicers:
        add(implementation, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server, address


@dataclass
class Failure:
    """A call that was refused."""

    code: str
    reason: str
    message: str
    facts: dict[str, str]
    fields: list[str]
    retry_seconds: float | None


async def refused(call: Any) -> Failure:
    """How a call fails; the test fails when it does not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("the call was accepted")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        for message in (info, bad, retry):
            detail.Unpack(message)
    seconds = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    fields = [violation.field for violation in bad.field_violations]
    return Failure(error.code().name, info.reason, error.details() or "", dict(info.metadata), fields, seconds)


class _Token(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return await continuation(_with(details, self._token), request)


class _StreamToken(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return await continuation(_with(details, self._token), request)


def _with(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return details._replace(metadata=metadata)
