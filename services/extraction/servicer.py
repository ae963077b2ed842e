"""lensmesh.extraction.v1.ExtractionService: proto in, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from google.api import httpbody_pb2
from google.protobuf import empty_pb2
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.extraction.v1 import extraction_pb2_grpc

from services.extraction import messages
from services.extraction.operations import FileBytes, Operations
from services.extraction.streaming import Streams
from services.kit.idempotency import request_key

_SERVICE = "lensmesh.extraction.v1.ExtractionService"
SHARD_TYPE = "application/octet-stream"


class ExtractionServicer(extraction_pb2_grpc.ExtractionServiceServicer):
    """Activations of models over datasets."""

    def __init__(self, operations: Operations, streams: Streams) -> None:
        self._operations = operations
        self._streams = streams

    async def ExtractActivations(
        self, request: pb.ExtractActivationsRequest, context: Any
    ) -> pb.ExtractActivationsResponse:
        """Queue an extraction, answer it from a cache, or say what it would take."""
        wanted = messages.wanted(request)
        if request.validate_only:
            return messages.planned(await self._operations.plan(wanted))
        key = request_key(f"{_SERVICE}/ExtractActivations", request)
        return messages.started(await self._operations.extract(wanted, key))

    async def GetModelExtraction(self, request: pb.GetModelExtractionRequest, context: Any) -> pb.Extraction:
        """One extraction of a model."""
        return messages.extraction_message(await self._operations.get(request.extraction_id, request.model_id))

    async def GetExtraction(self, request: pb.GetExtractionRequest, context: Any) -> pb.Extraction:
        """One extraction."""
        return messages.extraction_message(await self._operations.get(request.id))

    async def ListExtractions(self, request: pb.ListExtractionsRequest, context: Any) -> pb.ListExtractionsResponse:
        """Extractions, newest first."""
        return messages.extraction_page(await self._operations.list(messages.wanted_page(request)))

    async def CancelExtraction(self, request: pb.CancelExtractionRequest, context: Any) -> pb.Extraction:
        """Stop an extraction within one batch."""
        return messages.extraction_message(await self._operations.cancel(request.id))

    async def PauseExtraction(self, request: pb.PauseExtractionRequest, context: Any) -> pb.Extraction:
        """Stop an extraction for now."""
        return messages.extraction_message(await self._operations.pause(request.id))

    async def ResumeExtraction(self, request: pb.ResumeExtractionRequest, context: Any) -> pb.Extraction:
        """Let a paused extraction go on."""
        return messages.extraction_message(await self._operations.resume(request.id))

    async def DeleteExtraction(self, request: pb.DeleteExtractionRequest, context: Any) -> empty_pb2.Empty:
        """Forget an extraction that has ended."""
        await self._operations.delete(request.id)
        return empty_pb2.Empty()

    async def GetActivationCache(self, request: pb.GetActivationCacheRequest, context: Any) -> pb.ActivationCache:
        """One cache with its shards."""
        return messages.cache_message(await self._operations.cache(request.id))

    async def ListActivationCaches(
        self, request: pb.ListActivationCachesRequest, context: Any
    ) -> pb.ListActivationCachesResponse:
        """Caches, newest first."""
        return messages.cache_page(await self._operations.caches(messages.wanted_page(request)))

    async def DeleteActivationCache(self, request: pb.DeleteActivationCacheRequest, context: Any) -> empty_pb2.Empty:
        """Delete a cache and its files."""
        await self._operations.delete_cache(request.id)
        return empty_pb2.Empty()

    async def VerifyActivationCache(
        self, request: pb.VerifyActivationCacheRequest, context: Any
    ) -> pb.VerifyActivationCacheResponse:
        """Check every file against its digest."""
        problems = [messages.problem(damage) for damage in await self._operations.verify(request.id)]
        return pb.VerifyActivationCacheResponse(id=request.id, ok=not problems, problems=problems)

    async def ReadShard(self, request: pb.ReadShardRequest, context: Any) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Bytes of a shard."""
        part = self._operations.read_shard(request.id, request.index, request.offset, request.length)
        async for body in _sent(part, context):
            yield body

    async def ReadCacheFile(
        self, request: pb.ReadCacheFileRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Bytes of a file of a cache."""
        part = self._operations.read_file(request.id, request.name, request.offset, request.length)
        async for body in _sent(part, context):
            yield body

    async def ReadUnit(self, request: pb.ReadUnitRequest, context: Any) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """A file of a unit."""
        parts = self._operations.read_unit(
            request.extraction_id, request.unit, request.fence, sums=request.sums, offset=request.offset
        )
        async for part in parts:
            yield httpbody_pb2.HttpBody(content_type=SHARD_TYPE, data=part)

    async def OpenCache(self, request: pb.OpenCacheRequest, context: Any) -> pb.OpenedCache:
        """Handle and manifest for a reader inside the mesh."""
        return messages.opened(await self._operations.open(request.id))

    async def StreamActivations(
        self, request: pb.StreamActivationsRequest, context: Any
    ) -> AsyncIterator[pb.StreamActivationsResponse]:
        """Activations as they are computed."""
        async with self._streams.open(messages.wanted_stream(request)) as stream:
            yield messages.stream_facts(stream.facts)
            async with aclosing(stream.parts()) as parts:
                async for part in parts:
                    yield messages.stream_part(part)


async def _sent(part: AbstractAsyncContextManager[FileBytes], context: Any) -> AsyncIterator[httpbody_pb2.HttpBody]:
    async with part as file:
        await context.send_initial_metadata((("x-total-size", str(file.total)),))
        async for chunk in file.chunks:
            yield httpbody_pb2.HttpBody(content_type=SHARD_TYPE, data=chunk)
