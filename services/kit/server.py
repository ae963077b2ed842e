"""One process of the mesh: what services contribute, the gRPC server, health, reflection, jobs, and a graceful end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from services.kit import audit, errors, metrics
from services.kit.artifacts import ArtifactStore
from services.kit.auth import TokenVerifier
from services.kit.channels import SERVER_OPTIONS
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.health import Health
from services.kit.housekeeping import keep_house
from services.kit.interceptors import CallInterceptor
from services.kit.jobs import Handler, JobStore, Worker
from services.kit.logs import get_logger
from services.kit.methods import Method, methods_of
from services.kit.waiting import cancel_all

READINESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Servicer:
    """One gRPC service of a process."""

    add: Callable[[Any, grpc.aio.Server], None]
    """The generated `add_…Servicer_to_server`."""
    implementation: Any
    name: str
    """Full name, for example `lensmesh.registry.v1.ModelService`."""


@dataclass(slots=True)
class Part:
    """What one service contributes to its process."""

    servicers: list[Servicer]
    handlers: dict[str, Handler] = field(default_factory=dict)
    """Job kinds it works on."""
    limits: dict[str, int] = field(default_factory=dict)
    """How many jobs of a kind may run in the whole mesh."""
    slots: int = 0
    """Jobs that must be able to run side by side, because some wait for others."""
    background: list[Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=list)
    """Run until cancelled; when one ends by an error the process ends, and the supervisor starts it anew."""
    readiness: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    """Raise when not ready; the message is shown on /readyz."""
    close: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Called in reverse order at the end."""


class Residency(Protocol):
    """The residency pool as the kit sees it: an object it only hands on."""


@dataclass(slots=True)
class Context:
    """What a process gives to the services composed into it."""

    settings: Settings
    database: Database
    jobs: JobStore
    artifacts: ArtifactStore
    metrics: CollectorRegistry
    registry: grpc.aio.Channel | None
    """Channel to the registry as the mesh itself; None in the registry."""
    host_id: str
    """Stable name of the process in the mesh, for example `device-0`."""
    incarnation: str
    """Changes with every start of the process."""
    device: str
    """Device as torch names it, `cpu` or `cuda:0`; empty in the registry."""
    address: str
    """gRPC address under which others reach this process, host:port."""
    services: tuple[str, ...]
    """Services composed into the process."""
    residency: Any = None
    """The residency pool; None in the registry."""


async def run(context: Context, parts: list[Part], *, metrics_address: str, slots: int) -> None:
    """Serve until SIGTERM or SIGINT, or until a background task fails; then drain and close.

    Args:
        context: what the parts were composed with.
        parts: the services.
        metrics_address: host:port of /metrics, /healthz and /readyz.
        slots: jobs that this process runs side by side.

    Raises:
        errors.Unavailable: the gRPC port is taken.
    """
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    checks = {"database": context.database.ping} | {k: v for part in parts for k, v in part.readiness.items()}
    handlers = {kind: handler for part in parts for kind, handler in part.handlers.items()}
    limits = {kind: limit for part in parts for kind, limit in part.limits.items()}
    host, _, port = metrics_address.rpartition(":")
    async with AsyncExitStack() as stack:
        for part in parts:
            for close in part.close:
                stack.push_async_callback(close)
        serving = await stack.enter_async_context(_grpc_server(context, parts))
        tasks = [
            asyncio.create_task(metrics.serve_http(context.metrics, checks, host, int(port)), name="http"),
            asyncio.create_task(metrics.measure_loop_lag(context.metrics), name="loop-lag"),
            asyncio.create_task(keep_house(context.database, context.artifacts), name="housekeeping"),
            asyncio.create_task(_report_health(serving, checks), name="health"),
            *(asyncio.create_task(task(), name=task.__qualname__) for part in parts for task in part.background),
        ]
        if handlers:
            worker = Worker(
                context.jobs,
                handlers,
                device=context.device,
                incarnation=context.incarnation,
                limits=limits,
                slots=max(slots, *(part.slots for part in parts)),
                drain_seconds=context.settings.drain_seconds,
            )
            metrics.show_worker(context.metrics, worker.counts)
            tasks.append(asyncio.create_task(worker.run(), name="worker"))
        await _until_stopped(stop, tasks)


async def _until_stopped(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    stopped = asyncio.create_task(stop.wait(), name="stop")
    done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    await cancel_all([stopped, *reversed(tasks)])
    for task in done - {stopped}:
        if (error := task.exception()) is not None:
            get_logger("server").error("background task failed", task=task.get_name(), exc_info=error)
            raise error


@asynccontextmanager
async def _grpc_server(context: Context, parts: list[Part]) -> AsyncIterator[Health]:
    servicers = [servicer for part in parts for servicer in part.servicers]
    methods: list[Method] = [method for servicer in servicers for method in methods_of(servicer.name)]
    settings = context.settings
    verifier = TokenVerifier(
        settings.jwt_keys, settings.service_token_path, issuer=settings.jwt_issuer, audience=settings.jwt_audience
    )
    log = audit.AuditLog(context.database)
    interceptor = CallInterceptor(methods, verifier, metrics.RpcMetrics(context.metrics, methods), log.record)
    server = grpc.aio.server(interceptors=[interceptor], options=SERVER_OPTIONS)
    for servicer in servicers:
        servicer.add(servicer.implementation, server)
    serving = Health()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    reflection.enable_server_reflection(
        [s.name for s in servicers] + [health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    _listen(server, context.address, settings)
    await server.start()
    try:
        yield serving
    finally:
        await serving.enter_graceful_shutdown()
        await server.stop(settings.drain_seconds)


def _listen(server: grpc.aio.Server, address: str, settings: Settings) -> None:
    try:
        if settings.tls_certificate_file is not None and settings.tls_key_file is not None:
            pair = (settings.tls_key_file.read_bytes(), settings.tls_certificate_file.read_bytes())
            server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise errors.Unavailable(f"cannot listen on {address}: the port is in use") from error


async def _report_health(serving: Health, checks: dict[str, Callable[[], Awaitable[None]]]) -> None:
    """Until cancelled, let grpc.health say what /readyz says."""
    while True:
        failing = await metrics.failing_checks(checks)
        await serving.report(failing)
        await asyncio.sleep(READINESS_SECONDS)
