"""Composition root of the extension service."""

from __future__ import annotations

from typing import Any

from lensmesh.extensions.v1.extensions_pb2_grpc import add_ExtensionServiceServicer_to_server

from services.extensions.adapters.datasets import RegisteredDatasets
from services.extensions.adapters.peers import Peers
from services.extensions.adapters.postgres import PostgresStore
from services.extensions.adapters.residency import PooledBases
from services.extensions.adapters.run import ClaimedMerge, ClaimedRun
from services.extensions.adapters.team import TeamProcesses
from services.extensions.config import ExtensionSettings
from services.extensions.domain import JOB_KIND, MERGE_KIND
from services.extensions.exchanging import Exchange, MergeJob
from services.extensions.operations import Operations
from services.extensions.servicer import ExtensionServicer
from services.extensions.training import TrainingJob
from services.kit.channels import open_channel
from services.kit.jobs import Claim
from services.kit.server import Context, Part, Servicer
from services.residency.catalogue import Catalogue
from services.residency.hosts import Hosts

HOST_SERVICE = "lensmesh.residency.v1.ModelHostService"


async def compose(context: Context) -> Part:
    """What this service contributes to its process."""
    assert context.registry is not None, "the extension service needs a registry"
    settings = ExtensionSettings(**context.settings.model_dump())
    store = PostgresStore(context.database, context.jobs, context.artifacts)
    catalogue = Catalogue(context.registry, context.host_id)
    hosts = Hosts(context.registry, lambda address: open_channel(address, settings, (HOST_SERVICE,)), context.host_id)
    peers = Peers(catalogue, context.registry, hosts)
    bases = PooledBases(context.residency, catalogue.ensure_resident)
    datasets = RegisteredDatasets(catalogue, settings.dataset_roots)
    training = TrainingJob(
        store,
        hosts,
        bases,
        datasets,
        peers,
        teams=TeamProcesses(),
        checkpoint_seconds=settings.extension_checkpoint_seconds,
    )

    async def train(claim: Claim) -> dict[str, Any]:
        return await training.run(ClaimedRun(claim, store))

    merging = MergeJob(store, hosts, bases, peers)

    async def merge(claim: Claim) -> dict[str, Any]:
        return await merging.run(ClaimedMerge(claim, store))

    return Part(
        servicers=[
            Servicer(
                add=add_ExtensionServiceServicer_to_server,
                implementation=ExtensionServicer(
                    Operations(store, peers, bases, datasets), Exchange(store, peers, bases, settings.model_roots)
                ),
                name="lensmesh.extensions.v1.ExtensionService",
            )
        ],
        handlers={JOB_KIND: train, MERGE_KIND: merge},
        limits={JOB_KIND: settings.max_concurrent_extension_trainings},
        close=[hosts.close],
    )
