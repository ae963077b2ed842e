"""Dataset records as `texts.open_rows` wants them, read from the registry."""

from __future__ import annotations

from typing import cast

import grpc
from lensmesh.registry.v1 import datasets_pb2, datasets_pb2_grpc

from services.residency.texts import DatasetRecord, Source

_SOURCES = {
    datasets_pb2.DATASET_SOURCE_HUGGINGFACE: "huggingface",
    datasets_pb2.DATASET_SOURCE_LOCAL: "local",
    datasets_pb2.DATASET_SOURCE_INLINE: "inline",
}


async def dataset_record(registry: grpc.aio.Channel, dataset_id: str) -> DatasetRecord:
    """A registered dataset, with its texts where it is an inline one.

    Raises:
        grpc.aio.AioRpcError: NOT_FOUND, or the registry does not answer.
    """
    stub = datasets_pb2_grpc.DatasetServiceStub(registry)
    dataset = await stub.GetDataset(datasets_pb2.GetDatasetRequest(id=dataset_id))
    texts: list[str] = []
    if dataset.source == datasets_pb2.DATASET_SOURCE_INLINE:
        async for part in stub.ReadInlineTexts(datasets_pb2.ReadInlineTextsRequest(id=dataset_id)):
            texts.extend(part.texts)
    return DatasetRecord(
        id=dataset.id,
        source=cast(Source, _SOURCES[dataset.source]),
        identifier=dataset.identifier,
        split=dataset.split or "train",
        text_field=dataset.text_field or "text",
        prompt_field=dataset.prompt_field or None,
        target_field=dataset.target_field or None,
        texts=tuple(texts),
        digest=dataset.digest or None,
    )
