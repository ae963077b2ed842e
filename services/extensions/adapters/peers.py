"""The registry, and the host that a base is on, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import grpc
from google.protobuf import json_format
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import (
    devices_pb2,
    groups_pb2,
    groups_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from lensmesh.residency.v1 import residency_pb2

from services.extensions.domain import BaseModel, Extension, Generated, Prompt, Switch
from services.kit import errors
from services.residency.catalogue import LOAD_SECONDS, LOOK_UP_SECONDS, Catalogue, translated_calls
from services.residency.hosts import Hosts

GROUPS_PAGE = 500


class Peers:
    """Implements the port `Catalogue`."""

    def __init__(self, catalogue: Catalogue, registry: grpc.aio.Channel, hosts: Hosts) -> None:
        """Use these.

        Args:
            catalogue: the registry's models.
            registry: channel to the registry as the mesh itself.
            hosts: where models are.
        """
        self._catalogue = catalogue
        self._models = models_pb2_grpc.ModelServiceStub(registry)
        self._groups = groups_pb2_grpc.GroupServiceStub(registry)
        self._hosts = hosts

    async def model(self, model_id: str) -> BaseModel:
        """The catalogue's record."""
        model = await self._catalogue.model(model_id)
        if not model.HasField("parameter_count"):
            raise errors.Conflict(f"the files of {model_id} were not read yet; load it once", metadata={"id": model_id})
        return BaseModel(
            id=model.id,
            model_type=model.model_type,
            config=json_format.MessageToDict(model.config),
            parameter_count=model.parameter_count,
            digest=model.digest,
            name=model.name,
            quantization=types_pb2.Quantization.Name(model.quantization).removeprefix("QUANTIZATION_").lower(),
        )

    async def register(self, name: str, digest: str, request_id: str) -> str:
        """As a local model: below the store's own root its identifier is the digest."""
        request = models_pb2.CreateModelRequest(
            name=name, source=types_pb2.MODEL_SOURCE_LOCAL, model_identifier=digest, request_id=request_id
        )
        with translated_calls():
            return (await self._models.CreateModel(request, timeout=LOAD_SECONDS)).id

    async def active_extensions(self, model_ids: set[str]) -> set[str]:
        """What is active on the hosts; a lens of a group stands for its extension there."""
        active: set[str] = set()
        for model_id in sorted(model_ids):
            lens_id = await self._active_lens(model_id)
            if lens_id:
                lenses = (lens for group in await self._groups_of(model_id) for lens in group.lenses)
                active.add(next((lens.extension_id for lens in lenses if lens.id == lens_id), lens_id))
        return active

    async def _active_lens(self, model_id: str) -> str:
        with translated_calls():
            host = await self._hosts.having(model_id)
            if host is None:
                return ""
            state = await host.GetState(residency_pb2.GetStateRequest(), timeout=LOOK_UP_SECONDS)
        return next((model.active_lens_id for model in state.models if model.model_id == model_id), "")

    async def lenses_of(self, extension: Extension) -> list[str]:
        """Looked up in the groups of its base."""
        groups = await self._groups_of(extension.model_id)
        return [lens.id for group in groups for lens in group.lenses if lens.extension_id == extension.id]

    async def _groups_of(self, model_id: str) -> list[groups_pb2.Group]:
        request = groups_pb2.ListGroupsRequest(model_id=model_id, limit=GROUPS_PAGE)
        found: list[groups_pb2.Group] = []
        while True:
            with translated_calls():
                page = await self._groups.ListGroups(request, timeout=LOOK_UP_SECONDS)
            found.extend(page.groups)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def take_off(self, extension: Extension) -> None:
        """The base alone first, if it was active; then the host detaches it."""
        await self.switch(extension, active=False)
        with translated_calls():
            host = await self._hosts.having(extension.model_id)
            if host is not None:
                request = residency_pb2.DetachLensRequest(model_id=extension.model_id, lens_id=extension.id)
                await host.DetachLens(request, timeout=LOOK_UP_SECONDS)

    async def switch(self, extension: Extension, active: bool) -> Switch:
        """A lens switch in the base's group; deactivating an extension that is not active changes nothing."""
        if not active and extension.id not in await self.active_extensions({extension.model_id}):
            return Switch(0.0, 0, 0, "")
        request = devices_pb2.SwitchExtensionRequest(model_id=extension.model_id)
        if active:
            request.extension_id = extension.id
            request.artifact_uri = extension.artifact_uri
            request.base_digest = extension.base_digest
        with translated_calls():
            done = await self._hosts.placement.SwitchExtension(request, timeout=LOAD_SECONDS)
        return Switch(done.seconds, done.memory_before_bytes, done.memory_after_bytes, done.active_extension_id)

    async def generate(self, extension: Extension, prompt: Prompt) -> Generated:
        """On the host that has the base; it is loaded into this process when none has."""
        with translated_calls():
            host = await self._hosts.of(extension.model_id)
            return _generated(await host.Generate(_request(extension, prompt)))

    async def generate_together(self, asked: Sequence[tuple[Extension, Prompt]]) -> list[Generated]:
        """On the host that has the base, in one call."""
        with translated_calls():
            host = await self._hosts.of(asked[0][0].model_id)
            requests = [_request(extension, prompt) for extension, prompt in asked]
            made = await host.GenerateTogether(residency_pb2.GenerateTogetherRequest(requests=requests))
            return [_generated(each) for each in made.texts]

    async def generate_stream(self, extension: Extension, prompt: Prompt) -> AsyncGenerator[Generated, None]:
        """The same; the call is cancelled when its reader leaves."""
        with translated_calls():
            call = (await self._hosts.of(extension.model_id)).GenerateStream(_request(extension, prompt))
            try:
                async for part in call:
                    yield _generated(part)
            finally:
                call.cancel()


def _request(extension: Extension, prompt: Prompt) -> residency_pb2.GenerateRequest:
    return residency_pb2.GenerateRequest(
        model_id=extension.model_id,
        prompt=prompt.text,
        max_new_tokens=prompt.max_new_tokens,
        temperature=prompt.temperature,
        seed=prompt.seed,
        extension=types_pb2.LensSpec(
            lens_id=extension.digest,
            kind=types_pb2.LENS_KIND_EXTENSION,
            artifact_uri=extension.artifact_uri,
            base_digest=extension.base_digest,
        ),
    )


def _generated(text: types_pb2.GeneratedText) -> Generated:
    return Generated(text.text, tuple(text.token_ids), text.seconds)
