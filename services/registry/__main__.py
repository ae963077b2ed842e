"""Compose the registry: the only file here that knows everyone."""

from __future__ import annotations

import asyncio
from functools import partial

from lensmesh.registry.v1 import datasets_pb2_grpc, devices_pb2_grpc, groups_pb2_grpc, jobs_pb2_grpc, models_pb2_grpc
from lensmesh.residency.v1 import residency_pb2_grpc  # noqa: F401 - its descriptors say what may be retried

from services.kit.channels import open_channel
from services.kit.errors import LensmeshError
from services.kit.jetstream import Broker, Relay
from services.kit.logs import get_logger
from services.kit.server import Context, Part, Servicer
from services.kit.watch import EventHub
from services.registry.adapters.files import RootedDatasets
from services.registry.adapters.jobs import handlers
from services.registry.adapters.metrics import RegistryMetrics
from services.registry.adapters.model_hosts import SERVICE, GrpcModelHosts
from services.registry.adapters.peers import GrpcPeers
from services.registry.adapters.postgres import LOAD_KIND, PRELOAD_KIND, SWITCH_KIND, PostgresStore
from services.registry.config import RegistrySettings
from services.registry.operations import hosts
from services.registry.operations.registry import Limits, Registry
from services.registry.servicer.datasets import DatasetServicer
from services.registry.servicer.devices import DeviceServicer, PlacementServicer
from services.registry.servicer.events import EventServicer, Feeds
from services.registry.servicer.groups import GroupServicer
from services.registry.servicer.jobs import JobServicer
from services.registry.servicer.models import ModelServicer

TICK_SECONDS = 1.0
OWNERS = {
    "model": "registry",
    "load": "registry",
    "group": "registry",
    "preload": "registry",
    "switch": "registry",
    "extension": "extensions",
}
"""Service in the NATS subject of an event, where it is not the event's own prefix."""


async def compose(context: Context) -> Part:
    """The control plane of the mesh."""
    settings = RegistrySettings()
    store = PostgresStore(context.database, context.jobs)
    model_hosts = GrpcModelHosts(partial(open_channel, settings=context.settings, services=(SERVICE,)))
    metrics = RegistryMetrics(context.metrics)
    registry = Registry(
        store=store,
        hosts=model_hosts,
        peers=GrpcPeers(store, model_hosts.channel),
        files=RootedDatasets(context.settings.dataset_roots),
        gauges=metrics,
        limits=Limits(
            loads_per_hour=settings.loads_per_hour,
            max_resident_models=settings.max_resident_models,
            host_timeout=settings.host_timeout,
            heartbeat_seconds=settings.heartbeat_seconds,
            minimum_residency=settings.minimum_residency,
            duplicate_at=settings.duplicate_at,
            predictive_preload=settings.predictive_preload,
        ),
    )
    broker = Broker(context.settings.nats_url)
    hub = EventHub(context.database, broker)
    unknown = await hosts.start(registry, [name for name in settings.preload.split(",") if name])
    if unknown:
        get_logger("registry").warning("nothing to preload under these names", names=unknown)

    async def reconcile() -> None:
        await keep_reconciled(registry)

    async def refresh_metrics() -> None:
        await metrics.keep_fresh(store, context.database)

    async def look_ahead() -> None:
        await registry.foresight.run(registry)

    return Part(
        servicers=_servicers(registry, context, Feeds(hub, context.jobs)),
        handlers=handlers(registry, context.jobs),
        limits=dict.fromkeys((LOAD_KIND, SWITCH_KIND, PRELOAD_KIND), settings.max_concurrent_loads),
        slots=3 * settings.max_concurrent_loads,  # switches and preloads wait for loads
        background=[
            broker.run,
            Relay(context.database, broker, OWNERS).run,
            hub.run,
            reconcile,
            refresh_metrics,
            look_ahead,
        ],
        readiness={"broker": broker.ping},
        close=[model_hosts.close],
    )


async def keep_reconciled(registry: Registry) -> None:
    """Until cancelled, compare rows with the hosts; a round that fails is logged, and the next one tries again."""
    while True:
        try:
            await hosts.tick(registry)
        except LensmeshError as error:
            get_logger("registry").warning("not reconciled", reason=error.reason, error=error.message)
        await asyncio.sleep(TICK_SECONDS)


def _servicers(registry: Registry, context: Context, feeds: Feeds) -> list[Servicer]:
    jobs = JobServicer(registry, context.jobs, feeds)
    return [
        Servicer(models_pb2_grpc.add_ModelServiceServicer_to_server, ModelServicer(registry, feeds), _name("Model")),
        Servicer(groups_pb2_grpc.add_GroupServiceServicer_to_server, GroupServicer(registry), _name("Group")),
        Servicer(datasets_pb2_grpc.add_DatasetServiceServicer_to_server, DatasetServicer(registry), _name("Dataset")),
        Servicer(devices_pb2_grpc.add_DeviceServiceServicer_to_server, DeviceServicer(registry), _name("Device")),
        Servicer(
            devices_pb2_grpc.add_PlacementServiceServicer_to_server, PlacementServicer(registry), _name("Placement")
        ),
        Servicer(jobs_pb2_grpc.add_JobServiceServicer_to_server, jobs, _name("Job")),
        Servicer(jobs_pb2_grpc.add_EventServiceServicer_to_server, EventServicer(feeds), _name("Event")),
    ]


def _name(noun: str) -> str:
    return f"lensmesh.registry.v1.{noun}Service"
