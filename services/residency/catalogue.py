"""What a device process asks of the registry: models, datasets with their texts, and that a model be here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from lensmesh.registry.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

from services.kit import status
from services.residency.texts import DatasetRecord, Source

SERVICES: Final = (
    "lensmesh.registry.v1.ModelService",
    "lensmesh.registry.v1.DatasetService",
    "lensmesh.registry.v1.PlacementService",
)
"""Full names, for the channel's retry policy."""
LOOK_UP_SECONDS: Final = 10.0
TEXTS_SECONDS: Final = 120.0
LOAD_SECONDS: Final = 3600.0
_SOURCES: Final[dict[int, Source]] = {
    datasets_pb2.DATASET_SOURCE_HUGGINGFACE: "huggingface",
    datasets_pb2.DATASET_SOURCE_LOCAL: "local",
    datasets_pb2.DATASET_SOURCE_INLINE: "inline",
}


@contextmanager
def translated_calls() -> Iterator[None]:
    """A failed call to another service raises the error that the service raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error


def json_of(struct: Struct) -> dict[str, Any]:
    """A struct as plain JSON; whole numbers are integers again, which protobuf has no word for."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            return int(value)
        return value

    return plain(json_format.MessageToDict(struct))


class Catalogue:
    """The registry as the services on this host see it."""

    def __init__(self, channel: grpc.aio.Channel, host_id: str) -> None:
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        self._datasets = datasets_pb2_grpc.DatasetServiceStub(channel)
        self._placement = devices_pb2_grpc.PlacementServiceStub(channel)
        self._host_id = host_id

    async def model(self, model_id: str) -> models_pb2.Model:
        """A model's row.

        Raises:
            errors.NotFound: `MODEL_NOT_FOUND`.
            errors.Unavailable: the registry does not answer.
        """
        with translated_calls():
            return await self._models.GetModel(models_pb2.GetModelRequest(id=model_id), timeout=LOOK_UP_SECONDS)

    async def dataset(self, dataset_id: str) -> datasets_pb2.Dataset:
        """A dataset's row.

        Raises:
            errors.NotFound: there is none.
            errors.Unavailable: the registry does not answer.
        """
        request = datasets_pb2.GetDatasetRequest(id=dataset_id)
        with translated_calls():
            return await self._datasets.GetDataset(request, timeout=LOOK_UP_SECONDS)

    async def readable(self, dataset: datasets_pb2.Dataset) -> DatasetRecord:
        """The dataset as `texts.open_rows` takes it; an inline one's texts are fetched.

        Raises:
            errors.NotFound: it was deleted meanwhile.
            errors.Unavailable: the registry does not answer.
        """
        texts: list[str] = []
        if dataset.source == datasets_pb2.DATASET_SOURCE_INLINE:
            request = datasets_pb2.ReadInlineTextsRequest(id=dataset.id)
            with translated_calls():
                async for part in self._datasets.ReadInlineTexts(request, timeout=TEXTS_SECONDS):
                    texts.extend(part.texts)
        return DatasetRecord(
            id=dataset.id,
            source=_SOURCES[dataset.source],
            identifier=dataset.identifier,
            split=dataset.split or "train",
            text_field=dataset.text_field or "text",
            prompt_field=dataset.prompt_field or None,
            target_field=dataset.target_field or None,
            texts=tuple(texts),
            digest=dataset.digest or None,
        )

    async def make_room(self, keep: Collection[str]) -> None:
        """Have the registry unload what is idle on the device of this process, but for these models.

        Raises:
            errors.LensmeshError: it does not answer, or does not know this process.
        """
        request = devices_pb2.MakeRoomRequest(host_id=self._host_id, model_ids=keep)
        with translated_calls():
            await self._placement.MakeRoom(request, timeout=LOAD_SECONDS)

    async def ensure_resident(self, model_id: str) -> None:
        """Have the registry load a model into this process; returns when it is here.

        Raises:
            errors.NotFound: `MODEL_NOT_FOUND`.
            errors.LensmeshError: why it cannot be loaded, for example `INSUFFICIENT_MEMORY`.
        """
        request = devices_pb2.EnsureResidentRequest(host_id=self._host_id, model_id=model_id)
        with translated_calls():
            await self._placement.EnsureResident(request, timeout=LOAD_SECONDS)
