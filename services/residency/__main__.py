"""Compose residency into a device-owning process, before the services that take models from it."""

from __future__ import annotations

from lensmesh.residency.v1 import residency_pb2_grpc

from services.kit.server import Context, Part, Servicer
from services.residency import custom
from services.residency.catalogue import Catalogue
from services.residency.config import ResidencySettings
from services.residency.disk_cache import DiskCache
from services.residency.memory import survey
from services.residency.metrics import ResidencyMetrics
from services.residency.operations import Host
from services.residency.pool import Pool
from services.residency.presence import Presence
from services.residency.sensors import Sensors, sources
from services.residency.servicer import ModelHostServicer


async def compose(context: Context) -> Part:
    """The pool of this process, served to the registry; other services find it in `context.residency`.

    Raises:
        AssertionError: the process has no channel to the registry.
    """
    assert context.registry is not None, "only the registry itself has no channel to it"
    settings = ResidencySettings(**context.settings.model_dump())
    memory = survey(context.device, settings.device_memory_limit, settings.park_memory_limit)
    cache = DiskCache(settings.state_dir / "quantized", settings.state_dir / "hub", settings.model_cache_limit)
    pool = Pool(context.device, memory.budget_bytes, memory.park_bytes, cache)
    context.residency = pool
    sensors = Sensors(sources(context.device, shared=memory.shared))
    host = Host(
        pool=pool,
        settings=settings,
        database=context.database,
        artifacts=context.artifacts,
        catalogue=Catalogue(context.registry, context.host_id),
        disk_cache=cache,
        metrics=ResidencyMetrics(context.metrics, pool, memory, sensors),
        guests=pool.guests,
        custom_classes=custom.allow(name for name in settings.custom_classes.split(",") if name),
    )
    presence = Presence(
        registry=context.registry,
        pool=pool,
        memory=memory,
        sensors=sensors,
        host_id=context.host_id,
        incarnation=context.incarnation,
        address=context.address,
        services=context.services,
    )
    return Part(
        servicers=[
            Servicer(
                add=residency_pb2_grpc.add_ModelHostServiceServicer_to_server,
                implementation=ModelHostServicer(host, context.incarnation),
                name="lensmesh.residency.v1.ModelHostService",
            )
        ],
        background=[presence.announce],
        close=[pool.close],
    )
