"""The other services, found through the hosts that announce them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from lensmesh.extensions.v1 import extensions_pb2, extensions_pb2_grpc
from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc
from lensmesh.training.v1 import training_pb2, training_pb2_grpc

from services.kit import errors
from services.registry.adapters.model_hosts import translated
from services.registry.domain import LensArtifact
from services.registry.ports import Store

CALL_SECONDS = 10.0
PAGE = 500


class GrpcPeers:
    """Implements Peers."""

    def __init__(self, store: Store, channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._store = store
        self._channel = channel

    async def transcoder(self, transcoder_id: str) -> LensArtifact:
        """A transcoder's files."""
        stub = training_pb2_grpc.TrainingServiceStub(await self._serving("training"))
        request = training_pb2.GetTranscoderRequest(id=transcoder_id)
        with translated():
            found = await stub.GetTranscoder(request, timeout=CALL_SECONDS)
        return LensArtifact(
            found.artifact_uri, found.base_digest, found.size_bytes, found.model_id, found.layer, found.d_in
        )

    async def extension(self, extension_id: str) -> LensArtifact:
        """An extension's files."""
        stub = extensions_pb2_grpc.ExtensionServiceStub(await self._serving("extensions"))
        request = extensions_pb2.GetExtensionRequest(id=extension_id)
        with translated():
            found = await stub.GetExtension(request, timeout=CALL_SECONDS)
        return LensArtifact(found.artifact_uri, found.base_digest, found.size_bytes, found.model_id)

    async def users_of_model(self, model_id: str) -> list[str]:
        """Transcoders, extensions and activation caches of a model."""
        return [f"{kind} {row.id}" for kind, row, _ in await self._of_model(model_id)]

    async def delete_users_of_model(self, model_id: str) -> None:
        """Delete them, what was made last first."""
        while users := await self._of_model(model_id):
            for _, row, delete in users:
                with translated():
                    await delete(row.id)

    async def _of_model(self, model_id: str) -> list[tuple[str, Any, Callable[[str], Any]]]:
        found: list[tuple[str, Any, Callable[[str], Any]]] = []
        if (channel := await self._announced("training")) is not None:
            training = training_pb2_grpc.TrainingServiceStub(channel)
            listed = training_pb2.ListTranscodersRequest(model_id=model_id, limit=PAGE)
            with translated():
                rows = (await training.ListTranscoders(listed, timeout=CALL_SECONDS)).transcoders
            found += [("transcoder", row, _deleting(training.DeleteTranscoder, training_pb2.DeleteTranscoderRequest))
                      for row in rows]  # fmt: skip
        if (channel := await self._announced("extensions")) is not None:
            extensions = extensions_pb2_grpc.ExtensionServiceStub(channel)
            asked = extensions_pb2.ListExtensionsRequest(model_id=model_id, limit=PAGE)
            with translated():
                made = (await extensions.ListExtensions(asked, timeout=CALL_SECONDS)).extensions
            found += [("extension", row, _deleting(extensions.DeleteExtension, extensions_pb2.DeleteExtensionRequest))
                      for row in made]  # fmt: skip
        if (channel := await self._announced("extraction")) is not None:
            extraction = extraction_pb2_grpc.ExtractionServiceStub(channel)
            wanted = extraction_pb2.ListActivationCachesRequest(model_id=model_id, limit=PAGE)
            with translated():
                caches = (await extraction.ListActivationCaches(wanted, timeout=CALL_SECONDS)).activation_caches
            delete = _deleting(extraction.DeleteActivationCache, extraction_pb2.DeleteActivationCacheRequest)
            found += [("activation cache", row, delete) for row in caches]
        return found

    async def _serving(self, service: str) -> grpc.aio.Channel:
        """A channel to a service.

        Raises:
            errors.Unavailable: `NO_HOST`.
        """
        channel = await self._announced(service)
        if channel is None:
            raise _no_host(service)
        return channel

    async def _announced(self, service: str) -> grpc.aio.Channel | None:
        """A channel to a service; None when no host ever announced it.

        Raises:
            errors.Unavailable: `NO_HOST`: those that announced it are lost.
        """
        async with self._store.transaction() as tx:
            hosts = [host for host in await tx.placement.all_hosts() if service in host.services]
        if not hosts:
            return None
        alive = [host for host in hosts if not host.lost]
        if not alive:
            raise _no_host(service)
        return self._channel(alive[0].address)


def _deleting(method: Any, request_class: Any) -> Callable[[str], Any]:
    def delete(resource_id: str) -> Any:
        return method(request_class(id=resource_id), timeout=CALL_SECONDS)

    return delete


def _no_host(service: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"No live host serves {service}", reason="NO_HOST", metadata={"service": service}, retry_after=5.0
    )
