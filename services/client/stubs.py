"""The mesh over gRPC with the generated stubs: what another service does, without torch and without the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from lensmesh.extensions.v1 import extensions_pb2, extensions_pb2_grpc
from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc
from lensmesh.registry.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    groups_pb2,
    groups_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from lensmesh.training.v1 import training_pb2, training_pb2_grpc, transcoders_pb2, transcoders_pb2_grpc

from gateway.decode import decode
from gateway.encode import encode
from gateway.frames import frame
from services.client.api import ApiError, Event
from services.kit.errors import LensmeshError
from services.kit.status import from_rpc_error

_STUBS: tuple[tuple[str, Any, Any, str], ...] = (
    ("registry", models_pb2, models_pb2_grpc.ModelServiceStub, "ModelService"),
    ("registry", groups_pb2, groups_pb2_grpc.GroupServiceStub, "GroupService"),
    ("registry", datasets_pb2, datasets_pb2_grpc.DatasetServiceStub, "DatasetService"),
    ("registry", devices_pb2, devices_pb2_grpc.DeviceServiceStub, "DeviceService"),
    ("registry", jobs_pb2, jobs_pb2_grpc.JobServiceStub, "JobService"),
    ("extraction", extraction_pb2, extraction_pb2_grpc.ExtractionServiceStub, "ExtractionService"),
    ("training", training_pb2, training_pb2_grpc.TrainingServiceStub, "TrainingService"),
    ("training", transcoders_pb2, transcoders_pb2_grpc.TranscoderServiceStub, "TranscoderService"),
    ("extensions", extensions_pb2, extensions_pb2_grpc.ExtensionServiceStub, "ExtensionService"),
)
_DEADLINE_SECONDS = 600.0


class StubApi:
    """Every public service through its generated stub, with one user's token."""

    def __init__(self, addresses: dict[str, str], token: str) -> None:
        """Nothing is sent before the first call.

        Args:
            addresses: gRPC host:port by service: registry, extraction, training, extensions.
            token: JWT of the user.
        """
        self._metadata = [("authorization", f"Bearer {token}")]
        self._channels = {address: grpc.insecure_channel(address) for address in set(addresses.values())}
        self._methods: dict[str, tuple[Any, type[Message]]] = {}
        for service, module, stub, name in _STUBS:
            bound = stub(self._channels[addresses[service]])
            for method in module.DESCRIPTOR.services_by_name[name].methods:
                self._methods[method.name] = getattr(bound, method.name), GetMessageClass(method.input_type)

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            channel.close()

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        """See `Api.call`."""
        method, request = self._prepare(rpc, fields)
        try:
            return encode(method(request, metadata=self._metadata, timeout=_DEADLINE_SECONDS)) or {}
        except grpc.RpcError as error:
            raise _refused(error) from error

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        """See `Api.watch`."""
        method, request = self._prepare(rpc, fields)
        stream = method(request, metadata=self._metadata)
        try:
            for message in stream:
                made = frame(message)
                if not made.heartbeat:
                    yield Event(made.event, int(made.data.get("sequence", 0)), made.data)
        except grpc.RpcError as error:
            raise _refused(error) from error
        finally:
            stream.cancel()

    def _prepare(self, rpc: str, fields: dict[str, Any]) -> tuple[Any, Message]:
        method, message = self._methods[rpc]
        request = message()
        try:
            decode(request, fields)
        except LensmeshError as error:
            raise ApiError(error.reason, error.message) from error
        return method, request


def _refused(error: grpc.RpcError) -> ApiError:
    known = from_rpc_error(error)
    return ApiError(known.reason, known.message, dict(known.metadata))
