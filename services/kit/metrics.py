"""Prometheus metrics of one process, and the HTTP endpoint that shows them with liveness and readiness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import uvicorn
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from services.kit.methods import Method

RPC_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LAG_TICK_SECONDS = 0.5
READINESS_TIMEOUT_SECONDS = 3.0
Check = Callable[[], Awaitable[None]]


def new_registry() -> CollectorRegistry:
    """A registry that shows the process and the build."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    try:
        release = version("lensmesh")
    except PackageNotFoundError:
        release = "unknown"
    Info("build", "Version of Lensmesh", registry=registry).info({"version": release})
    return registry


class RpcMetrics:
    """The go-grpc-prometheus names that operators' rules already use; every label set exists from the start."""

    def __init__(self, registry: CollectorRegistry, methods: list[Method]) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started", "Rpcs started", labels, registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "Rpcs completed, by code", [*labels, "grpc_code"], registry=registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds until an rpc completed",
            labels,
            buckets=RPC_BUCKETS,
            registry=registry,
        )
        self._auth_failures = Counter("auth_failures", "Calls refused for their token", ["reason"], registry=registry)
        for method in methods:
            self._started.labels(*_labels(method))
            self._handled.labels(*_labels(method), "OK")
            self._seconds.labels(*_labels(method))

    @contextmanager
    def call(self, method: Method) -> Iterator[Callable[[str], None]]:
        """Count and time one call; the yielded function takes its status code when that is not OK."""
        code = "OK"

        def ended_with(status: str) -> None:
            nonlocal code
            code = status

        self._started.labels(*_labels(method)).inc()
        start = time.perf_counter()
        try:
            yield ended_with
        finally:
            self._seconds.labels(*_labels(method)).observe(time.perf_counter() - start)
            self._handled.labels(*_labels(method), code).inc()

    def refused(self, cause: str) -> None:
        """Count a call that was refused for its token."""
        self._auth_failures.labels(cause).inc()


def _labels(method: Method) -> tuple[str, str, str]:
    return ("server_stream" if method.streams else "unary", method.service, method.name)


class WorkerCounts(Protocol):
    """What a worker counts since its process started."""

    stale_fences: int
    renewal_failures: int


def show_worker(registry: CollectorRegistry, counts: WorkerCounts) -> None:
    """Show what this process's worker counts."""
    stale = Gauge("job_stale_fence", "Jobs this process gave up because their lease was lost", registry=registry)
    stale.set_function(lambda: counts.stale_fences)
    failures = Gauge("job_lease_renew_failures", "Lease renewals the database did not answer", registry=registry)
    failures.set_function(lambda: counts.renewal_failures)


async def measure_loop_lag(registry: CollectorRegistry) -> None:
    """Until cancelled, show how late the event loop runs its timers: torch work on the loop would show here."""
    lag = Gauge("event_loop_lag_seconds", "How late the event loop runs a timer", registry=registry)
    while True:
        start = time.monotonic()
        await asyncio.sleep(LAG_TICK_SECONDS)
        lag.set(max(0.0, time.monotonic() - start - LAG_TICK_SECONDS))


async def failing_checks(checks: dict[str, Check]) -> dict[str, str]:
    """Run all readiness checks side by side; name and reason of each one that fails."""

    async def run(check: Check) -> str | None:
        try:
            await asyncio.wait_for(check(), READINESS_TIMEOUT_SECONDS)
        except TimeoutError:
            return "no answer in time"
        except Exception as error:
            return getattr(error, "message", None) or type(error).__name__
        return None

    reasons = await asyncio.gather(*(run(check) for check in checks.values()))
    return {name: reason for name, reason in zip(checks, reasons, strict=True) if reason is not None}


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the process's own ones stop everything together."""

    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()


async def serve_http(registry: CollectorRegistry, checks: dict[str, Check], host: str, port: int) -> None:
    """Until cancelled, answer `/metrics`, `/healthz` and `/readyz`."""

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        failing = await failing_checks(checks)
        return JSONResponse({"ready": not failing, "failing": failing}, status_code=503 if failing else 200)

    app = Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])
    server = _Server(uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, lifespan="off"))
    try:
        await server.serve()
    finally:
        server.should_exit = True
