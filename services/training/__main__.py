"""Composition root of the training service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lensmesh.training.v1.training_pb2_grpc import add_TrainingServiceServicer_to_server
from lensmesh.training.v1.transcoders_pb2_grpc import add_TranscoderServiceServicer_to_server

from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.channels import open_channel
from services.kit.database import Database
from services.kit.jobs import Claim
from services.kit.server import Context, Part, Servicer
from services.residency.catalogue import Catalogue
from services.residency.hosts import Hosts
from services.residency.operations import MADE
from services.training.adapters.datasets import RegisteredTexts
from services.training.adapters.exchange import ExchangeStore, ForeignFolders
from services.training.adapters.judged import ClaimedEvaluation
from services.training.adapters.metrics import TrainingMetrics
from services.training.adapters.peers import ExtractionPeer, Peers
from services.training.adapters.postgres import PostgresStore
from services.training.adapters.processes import Processes
from services.training.adapters.residency import PooledModels
from services.training.adapters.run import ClaimedRun
from services.training.adapters.split import SplitModels
from services.training.config import TrainingSettings
from services.training.domain import EVALUATION_KIND, JOB_KIND, SPLIT_EVALUATION_KIND
from services.training.exchange import Exchange
from services.training.job import TrainingJob
from services.training.judging import EvaluationJob
from services.training.judging_split import Splitting
from services.training.operations import Operations
from services.training.servicer import TrainingServicer
from services.training.transcoder_servicer import TranscoderServicer

HOST_SERVICE = "lensmesh.residency.v1.ModelHostService"
EXTRACTION_SERVICE = "lensmesh.extraction.v1.ExtractionService"


async def compose(context: Context) -> Part:
    """What this service contributes to its process.

    Raises:
        errors.Invalid: the extraction service is neither here nor in the settings.
    """
    assert context.registry is not None, "the training service needs a registry"
    settings = TrainingSettings(**context.settings.model_dump())
    store = PostgresStore(context.database, context.jobs, context.artifacts)
    catalogue = Catalogue(context.registry, context.host_id)
    hosts = Hosts(context.registry, lambda address: open_channel(address, settings, (HOST_SERVICE,)), context.host_id)
    peers = Peers(catalogue, context.registry, hosts)
    address = _extraction_address(context, settings)
    channel = open_channel(address, settings, (EXTRACTION_SERVICE,))
    extraction = ExtractionPeer(channel, address, settings)
    files = PublishedFiles(context.database, context.artifacts)
    texts = RegisteredTexts(catalogue, settings.dataset_roots, settings.state_dir / "datasets")
    roots = [*settings.model_roots, context.artifacts.root / MADE]
    splits = SplitModels(catalogue, texts, roots, settings.state_dir / "hub", context.device)
    training = TrainingJob(
        extraction,
        splits,
        hosts,
        files,
        Processes(),
        device=context.device,
        threads=settings.threads_of_each,
        checkpoint_tokens=settings.training_checkpoint_tokens,
        checkpoint_seconds=settings.training_checkpoint_seconds,
    )
    metrics = TrainingMetrics(context.metrics)
    operations = Operations(
        store, peers, extraction, files, device=context.device, retention=settings.training_retention
    )
    models = PooledModels(context.residency, catalogue.ensure_resident)
    splitting = Splitting(splits, hosts, Processes(), settings.threads_of_each)
    evaluation = EvaluationJob(models, texts, files, splitting)

    async def train(claim: Claim) -> dict[str, Any]:
        run = ClaimedRun(claim, store, metrics, settings.state_dir / "trackers")
        try:
            with metrics.counted():
                return await training.run(run)
        finally:
            await run.close()

    async def evaluate(claim: Claim) -> dict[str, Any]:
        return await evaluation.run(ClaimedEvaluation(claim, context.artifacts))

    exchange = Exchange(
        ExchangeStore(store, context.database),
        peers,
        extraction,
        files=files,
        models=models,
        sources=ForeignFolders(settings.model_roots, settings.state_dir / "hub"),
    )
    return Part(
        servicers=[
            Servicer(
                add=add_TrainingServiceServicer_to_server,
                implementation=TrainingServicer(operations),
                name="lensmesh.training.v1.TrainingService",
            ),
            Servicer(
                add=add_TranscoderServiceServicer_to_server,
                implementation=TranscoderServicer(operations, exchange),
                name="lensmesh.training.v1.TranscoderService",
            ),
        ],
        handlers={JOB_KIND: train, EVALUATION_KIND: evaluate, SPLIT_EVALUATION_KIND: evaluate},
        limits={JOB_KIND: settings.max_concurrent_trainings, SPLIT_EVALUATION_KIND: 1},
        close=[channel.close, hosts.close],
    )


class PublishedFiles:
    """Implements both ports `Files` on the artifact store of this host."""

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts

    @asynccontextmanager
    async def reading(self, uri: str) -> AsyncIterator[Path]:
        """Under a lease."""
        async with self._artifacts.reading(self._database, uri) as folder:
            yield folder

    @asynccontextmanager
    async def here(self, uri: str) -> AsyncIterator[Path | None]:
        """Under a lease; nothing is fetched from a bucket."""
        if not self._artifacts.location(uri).exists():
            yield None
            return
        async with self._artifacts.reading(self._database, uri) as folder:
            yield folder


def _extraction_address(context: Context, settings: TrainingSettings) -> str:
    if settings.extraction_address:
        return settings.extraction_address
    if "extraction" not in context.services:
        raise errors.Invalid.of("LENSMESH_EXTRACTION_ADDRESS", "must name the extraction service, host:port")
    return context.address
