"""lensmesh.registry.v1.DatasetService: proto in, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty
from lensmesh.registry.v1 import datasets_pb2 as pb
from lensmesh.registry.v1 import datasets_pb2_grpc

from services.kit.idempotency import request_key
from services.registry.operations import datasets
from services.registry.operations.registry import Registry
from services.registry.servicer.calls import caller, page, page_fields
from services.registry.wire import to_dict, to_message


class DatasetServicer(datasets_pb2_grpc.DatasetServiceServicer):
    """The catalogue of datasets."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Any) -> pb.Dataset:
        """Register text."""
        fields = to_dict(request)
        del fields["request_id"]
        key = request_key("CreateDataset", request)
        made = await datasets.create_dataset(self._registry, caller(), datasets.NewDataset(**fields), key)
        return to_message(pb.Dataset, made)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.Dataset:
        """One dataset."""
        return to_message(pb.Dataset, await datasets.get_dataset(self._registry, request.id))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        """Datasets, newest first."""
        listed = await datasets.list_datasets(self._registry, page(request))
        rows = [to_message(pb.Dataset, dataset) for dataset in listed.rows]
        return pb.ListDatasetsResponse(datasets=rows, **page_fields(listed))

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Any) -> Empty:
        """Delete a dataset."""
        await datasets.delete_dataset(self._registry, request.id)
        return Empty()

    async def ReadInlineTexts(self, request: pb.ReadInlineTextsRequest, context: Any) -> AsyncIterator[pb.InlineTexts]:
        """The texts of an inline dataset."""
        async for texts in datasets.read_inline_texts(self._registry, request.id):
            yield pb.InlineTexts(texts=texts)
