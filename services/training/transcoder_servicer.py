"""lensmesh.training.v1.TranscoderService: proto in, proto out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.api import httpbody_pb2
from lensmesh.training.v1 import training_pb2, transcoders_pb2_grpc
from lensmesh.training.v1 import transcoders_pb2 as pb

from services.kit.idempotency import request_key
from services.training import messages, plots
from services.training import transcoder_messages as own
from services.training.exchange import Exchange
from services.training.operations import Operations

_SERVICE = "lensmesh.training.v1.TranscoderService"
_CONTENT_TYPE = "application/octet-stream"


class TranscoderServicer(transcoders_pb2_grpc.TranscoderServiceServicer):
    """What is done with trained transcoders."""

    def __init__(self, operations: Operations, exchange: Exchange) -> None:
        self._operations, self._exchange = operations, exchange

    async def ExportTranscoder(self, request: pb.ExportTranscoderRequest, context: Any) -> pb.TranscoderExport:
        """Write a transcoder as another tool's files."""
        if request.format == pb.TRANSCODER_FORMAT_NEURONPEDIA:
            return own.dashboards(request, await self._exchange.dashboards(request.id))
        format_ = own.FORMATS[request.format]
        done, published = await self._exchange.export(
            request.id, format_, prefix=request.prefix, cache_id=request.cache_id, rows=request.rows
        )
        return own.exported(request, done, published)

    async def ReadExportedFile(
        self, request: pb.ReadExportedFileRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Bytes of an exported file."""
        async with self._exchange.read(request.digest, request.name, request.offset, request.length) as part:
            await context.send_initial_metadata((("x-total-size", str(part.total)),))
            async for chunk in part.chunks:
                yield httpbody_pb2.HttpBody(content_type=_CONTENT_TYPE, data=chunk)

    async def GetFeature(self, request: pb.GetFeatureRequest, context: Any) -> pb.Feature:
        """One latent."""
        return own.feature(request, *await self._exchange.feature(request.id, request.feature))

    async def GetTrainingPlot(
        self, request: pb.GetTrainingPlotRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """A picture of a training."""
        points = await self._operations.history(request.id, 0)
        drawn = await asyncio.to_thread(plots.loss if request.plot == "loss" else plots.fvu, points)
        yield httpbody_pb2.HttpBody(content_type="image/png", data=drawn)

    async def GetTranscoderPlot(
        self, request: pb.GetTranscoderPlotRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """A picture of a transcoder's newest evaluation."""
        histogram = await self._operations.newest_density(request.id)
        yield httpbody_pb2.HttpBody(content_type="image/png", data=await asyncio.to_thread(plots.density, histogram))

    async def ImportTranscoder(self, request: pb.ImportTranscoderRequest, context: Any) -> training_pb2.Transcoder:
        """Make a transcoder of another tool's files."""
        key = request_key(f"{_SERVICE}/ImportTranscoder", request)
        return messages.transcoder(await self._exchange.load(own.wanted_import(request), key))

    async def CompareTranscoders(
        self, request: pb.CompareTranscodersRequest, context: Any
    ) -> pb.CompareTranscodersResponse:
        """Queue an evaluation for each of several transcoders and checkpoints."""
        key = request_key(f"{_SERVICE}/CompareTranscoders", request)
        return own.comparison(await self._operations.compare(own.wanted_comparison(request), key))

    async def GetEvaluations(self, request: pb.GetEvaluationsRequest, context: Any) -> pb.GetEvaluationsResponse:
        """Evaluations side by side."""
        found = await self._operations.evaluations_by_id(tuple(request.ids))
        return pb.GetEvaluationsResponse(evaluations=[messages.evaluation(one) for one in found])
