"""Composition root of the extraction service."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lensmesh.extraction.v1.extraction_pb2_grpc import add_ExtractionServiceServicer_to_server

from services.extraction.adapters.caches import PublishedCaches
from services.extraction.adapters.files import WorkFolders
from services.extraction.adapters.help import Helper, HelpingRun
from services.extraction.adapters.metrics import ExtractionMetrics
from services.extraction.adapters.peers import RegisteredDatasets, RegisteredModels
from services.extraction.adapters.places import StagedPlaces
from services.extraction.adapters.postgres import PostgresStore
from services.extraction.adapters.remote import RemoteUnits
from services.extraction.adapters.residency import PooledModels
from services.extraction.adapters.run import ClaimedRun, handled
from services.extraction.adapters.tidying import keep_tidy
from services.extraction.adapters.tokenizers import Tokenizers
from services.extraction.config import ExtractionSettings
from services.extraction.domain import JOB_KIND
from services.extraction.job import ExtractionJob
from services.extraction.operations import Operations
from services.extraction.servicer import ExtractionServicer
from services.extraction.streaming import Streams
from services.kit.jobs import Claim
from services.kit.server import Context, Part, Servicer
from services.residency.catalogue import Catalogue
from services.residency.operations import MADE


async def compose(context: Context) -> Part:
    """What this service contributes to its process."""
    assert context.registry is not None, "the extraction service needs a registry"
    settings = ExtractionSettings()
    caches = PublishedCaches(
        context.database,
        context.artifacts,
        limit_bytes=settings.activation_cache_limit,
        reuse_for=timedelta(hours=settings.activation_cache_reuse_hours),
        unused_for=timedelta(days=settings.activation_cache_unused_days),
    )
    metrics = ExtractionMetrics(context.metrics, settings.activation_cache_limit)
    store = PostgresStore(context.database, context.jobs, queue_limit=settings.extraction_queue_limit)
    registry = Catalogue(context.registry, context.host_id)
    catalogue = RegisteredModels(registry, context.registry)
    shared = context.settings
    model_roots = [*shared.model_roots, context.artifacts.root / MADE]
    tokenizers = Tokenizers(context.residency, model_roots, shared.state_dir / "hub")
    datasets = RegisteredDatasets(registry, tokenizers, shared.dataset_roots, shared.state_dir / "datasets")
    models = PooledModels(context.residency, registry.ensure_resident, context.artifacts)
    job = ExtractionJob(catalogue, models, datasets, caches)
    places = StagedPlaces(context.artifacts.root)
    streams = Streams(
        catalogue, models, datasets, places, device=context.device, most_streams=settings.max_activation_streams
    )
    operations = Operations(
        store,
        caches,
        catalogue,
        datasets,
        units=WorkFolders(context.artifacts.root),
        device=context.device,
        meters=metrics,
    )
    remote = RemoteUnits(shared)

    async def extract(claim: Claim) -> dict[str, Any]:
        return await handled(ClaimedRun(claim, caches, metrics, remote), job.run)

    helper = Helper(context.database, incarnation=context.incarnation, device=context.device)

    async def help_with(extraction_id: str) -> None:
        await job.help(
            HelpingRun(
                context.database,
                caches,
                metrics,
                extraction_id=extraction_id,
                holder=context.incarnation,
                address=context.address,
                lease=context.jobs.lease,
            )
        )

    async def help_others() -> None:
        await helper.keep_helping(lambda: job.idle, help_with)

    async def tidy() -> None:
        await keep_tidy(context.database, caches, metrics)

    return Part(
        servicers=[
            Servicer(
                add=add_ExtractionServiceServicer_to_server,
                implementation=ExtractionServicer(operations, streams),
                name="lensmesh.extraction.v1.ExtractionService",
            )
        ],
        handlers={JOB_KIND: extract},
        limits={JOB_KIND: settings.max_concurrent_extractions},
        background=[tidy, help_others],
    )
