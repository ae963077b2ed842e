"""`lensmesh serve NAME…`: build one process's Context, compose the named services into it, serve until stopped."""

from __future__ import annotations

import importlib
import os
import platform
import secrets
from contextlib import AsyncExitStack

from services.kit import errors, logs, migrate
from services.kit.artifacts import ArtifactStore
from services.kit.bucket import Bucket
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.database import Database
from services.kit.jobs import JobStore
from services.kit.metrics import new_registry
from services.kit.server import Context, Part, run

SERVICES = ("registry", "residency", "extraction", "training", "extensions")
REGISTRY_SERVICES = (
    "lensmesh.registry.v1.ModelService",
    "lensmesh.registry.v1.DatasetService",
    "lensmesh.registry.v1.PlacementService",
)


async def serve(names: list[str], device: str, listen: str, metrics: str) -> None:
    """Serve the named services in this process until it is told to stop.

    Args:
        names: services of SERVICES; the registry runs alone, the others own a device together. Residency is part of
            every process that owns a device; named alone, it only holds models there.
        device: `cpu` or `cuda:N`; ignored by the registry.
        listen: gRPC host:port.
        metrics: host:port of /metrics, /healthz and /readyz.

    Raises:
        errors.Invalid: an unknown service, or the registry together with others.
        errors.Unavailable: the database or a port cannot be had, or the schema is not at its head.
    """
    _check(names)
    owns_device = names != ["registry"]
    if owns_device:
        device = _pin(device)
        importlib.import_module("services.residency.memory").keep_freed()  # no other thread runs yet
    settings = Settings()
    logs.configure("+".join(names), settings.log_level)
    bucket = Bucket(settings.artifact_bucket, settings.artifact_endpoint) if settings.artifact_bucket else None
    async with AsyncExitStack() as stack:
        database = await Database.open(settings.database_url, settings.db_pool_min, settings.db_pool_max)
        stack.push_async_callback(database.close)
        await migrate.require_head(database)
        context = Context(
            settings=settings,
            database=database,
            jobs=JobStore(database, lease_seconds=settings.job_lease_seconds),
            artifacts=ArtifactStore(settings.artifact_dir, bucket),
            metrics=new_registry(),
            registry=open_channel(settings.registry_address, settings, _imported()) if owns_device else None,
            host_id=settings.host_id or f"{platform.node()}-{listen.rpartition(':')[2]}",
            incarnation=f"{os.getpid()}-{secrets.token_hex(8)}",
            device=device if owns_device else "",
            address=listen,
            services=tuple(names),
        )
        if context.registry is not None:
            stack.push_async_callback(context.registry.close)
        order = ["residency", *(name for name in names if name != "residency")] if owns_device else names
        parts: list[Part] = [
            await importlib.import_module(f"services.{name}.__main__").compose(context) for name in order
        ]
        await run(context, parts, metrics_address=metrics, slots=settings.job_slots)


def _check(names: list[str]) -> None:
    unknown = [name for name in names if name not in SERVICES]
    if unknown or not names:
        raise errors.Invalid.of("service", f"{', '.join(unknown) or 'none given'}; known are {', '.join(SERVICES)}")
    if "registry" in names and len(names) > 1:
        raise errors.Invalid.of("service", "the registry owns no device and runs in a process of its own")


def _pin(device: str) -> str:
    """Make `cuda:N` the only GPU this process sees, before torch is imported; it is `cuda:0` from then on."""
    if not device.startswith("cuda:"):
        return device
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", device.removeprefix("cuda:"))
    return "cuda:0"


def _imported() -> tuple[str, ...]:
    importlib.import_module("lensmesh.registry.v1.models_pb2")
    importlib.import_module("lensmesh.registry.v1.datasets_pb2")
    importlib.import_module("lensmesh.registry.v1.devices_pb2")
    return REGISTRY_SERVICES
