"""The registry, the extraction service and the hosts of models, over gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from lensmesh.common.v1 import types_pb2
from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc
from lensmesh.registry.v1 import groups_pb2, groups_pb2_grpc
from lensmesh.residency.v1 import residency_pb2

from services.kit import errors
from services.kit.config import Settings
from services.residency.catalogue import LOAD_SECONDS, LOOK_UP_SECONDS, Catalogue, translated_calls
from services.residency.hosts import Hosts
from services.training.dialogue import Live
from services.training.domain import BaseModel, Cache, Plan, Transcoder
from services.training.live_rows import stream_request

GROUPS_PAGE = 500
POLL_SECONDS = 0.5
_ENDED = (
    extraction_pb2.EXTRACTION_STATUS_COMPLETED,
    extraction_pb2.EXTRACTION_STATUS_FAILED,
    extraction_pb2.EXTRACTION_STATUS_CANCELLED,
)


class Peers:
    """Implements the port `Catalogue`."""

    def __init__(self, catalogue: Catalogue, registry: grpc.aio.Channel, hosts: Hosts) -> None:
        """Use these.

        Args:
            catalogue: the registry's models and datasets.
            registry: channel to the registry as the mesh itself.
            hosts: where models are.
        """
        self._catalogue = catalogue
        self._groups = groups_pb2_grpc.GroupServiceStub(registry)
        self._hosts = hosts

    async def model(self, model_id: str) -> BaseModel:
        """The registry's row."""
        model = await self._catalogue.model(model_id)
        return BaseModel(
            model.id,
            model.model_type,
            model.digest,
            model.num_layers,
            model.hidden_size,
            model.estimated_memory_bytes,
        )

    async def require_dataset(self, dataset_id: str) -> None:
        """The registry's row."""
        await self._catalogue.dataset(dataset_id)

    async def lenses_of(self, transcoder: Transcoder) -> list[str]:
        """Looked up in the groups of its model."""
        request = groups_pb2.ListGroupsRequest(model_id=transcoder.model_id, limit=GROUPS_PAGE)
        found: list[str] = []
        while True:
            with translated_calls():
                page = await self._groups.ListGroups(request, timeout=LOOK_UP_SECONDS)
            lenses = (lens for group in page.groups for lens in group.lenses)
            found.extend(lens.id for lens in lenses if lens.transcoder_id == transcoder.id)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def encode(
        self, transcoder: Transcoder, text: str, token_ids: tuple[int, ...], top_k: int, prefix: int
    ) -> types_pb2.LensReading:
        """On the host that has the model; it is loaded into this process when none has."""
        request = residency_pb2.EncodeRequest(
            model_id=transcoder.model_id,
            artifact_uri=transcoder.artifact_uri,
            text=text,
            token_ids=token_ids,
            top_k=top_k,
            prefix=prefix,
        )
        with translated_calls():
            return await (await self._hosts.of(transcoder.model_id)).Encode(request, timeout=LOAD_SECONDS)


class ExtractionPeer:
    """Implements the ports `Extraction` and `Extractions`."""

    def __init__(self, channel: grpc.aio.Channel, address: str, settings: Settings) -> None:
        """Use a channel to `address`; a process of its own reaches that with the settings' token and TLS roots."""
        self._stub = extraction_pb2_grpc.ExtractionServiceStub(channel)
        self._address, self._settings = address, settings

    async def cache(self, cache_id: str) -> Cache:
        """The service's row."""
        request = extraction_pb2.GetActivationCacheRequest(id=cache_id)
        with translated_calls():
            found = await self._stub.GetActivationCache(request, timeout=LOOK_UP_SECONDS)
        return _cache(found)

    async def start(self, model_id: str, dataset_id: str, plan: Plan, request_id: str) -> str:
        """An ordinary request, as rows."""
        request = extraction_pb2.ExtractActivationsRequest(
            model_id=model_id,
            dataset_id=dataset_id,
            hook_points=plan.hook_points,
            layout=extraction_pb2.LAYOUT_ROWS,
            max_tokens=plan.num_tokens,
            request_id=request_id,
        )
        with translated_calls():
            started = await self._stub.ExtractActivations(request, timeout=LOOK_UP_SECONDS)
        return started.extraction_id

    async def finished(self, extraction_id: str) -> str:
        """Asked for now and then; a service that does not answer for a while is asked again."""
        request = extraction_pb2.GetExtractionRequest(id=extraction_id)
        while True:
            try:
                with translated_calls():
                    found = await self._stub.GetExtraction(request, timeout=LOOK_UP_SECONDS)
            except errors.Unavailable:
                found = None
            if found is not None and found.status in _ENDED:
                return _cache_id(found)
            await asyncio.sleep(POLL_SECONDS)

    async def open(self, cache_id: str) -> Cache:
        """The service notes that it is used."""
        request = extraction_pb2.OpenCacheRequest(id=cache_id)
        with translated_calls():
            opened = await self._stub.OpenCache(request, timeout=LOOK_UP_SECONDS)
        return _cache(opened.cache)

    async def streamed(self, model_id: str, dataset_id: str, plan: Plan) -> Cache:
        """Its first message; nothing is computed for who leaves then but the check of the hook points."""
        request = stream_request(self.live(model_id, dataset_id, plan, Path()))
        call = self._stub.StreamActivations(request, timeout=LOAD_SECONDS)
        try:
            with translated_calls():
                facts = (await call.read()).facts
        finally:
            call.cancel()
        widths = dict(zip(facts.hook_points, facts.widths, strict=True))
        return Cache("", model_id, facts.model_digest, "", facts.rows_per_pass, widths)

    def live(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> Live:
        """Rows are mixed by the training's own seed."""
        roots = self._settings.tls_ca_file
        return Live(
            address=self._address,
            state_dir=str(self._settings.state_dir),
            tls_ca_file="" if roots is None else str(roots),
            folder=str(folder),
            model_id=model_id,
            dataset_id=dataset_id,
            hook_points=plan.hook_points,
            seed=plan.coders[0].config["seed"],
        )


def _cache(found: extraction_pb2.ActivationCache) -> Cache:
    return Cache(
        id=found.id,
        model_id=found.model_id,
        model_digest=found.model_digest,
        storage_uri=found.storage_uri,
        tokens=found.tokens,
        widths={point.hook_point: point.width for point in found.statistics},
    )


def _cache_id(found: extraction_pb2.Extraction) -> str:
    if found.status == extraction_pb2.EXTRACTION_STATUS_COMPLETED:
        return found.cache_id
    said = found.error_message or "it was cancelled"
    raise errors.Failed(
        f"extraction {found.extraction_id}: {said}",
        reason=found.error_code or "EXTRACTION_FAILED",
        metadata={"extraction_id": found.extraction_id},
    )
