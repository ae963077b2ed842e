"""Host processes over gRPC: one channel per address, with the mesh's own token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from lensmesh.common.v1 import types_pb2
from lensmesh.residency.v1 import residency_pb2 as pb
from lensmesh.residency.v1 import residency_pb2_grpc

from services.kit import errors
from services.kit.status import from_rpc_error
from services.registry.domain import Facts, HostedModel, LensArtifact, Need, Source
from services.registry.ports import LoadStep, Switched
from services.registry.wire import hosted, to_dict, to_message

SERVICE = "lensmesh.residency.v1.ModelHostService"
READ_SECONDS = 300.0
"""For reading a model's headers and digest, which may be many gigabytes."""
STALL_SECONDS = 300.0
"""A load without news for so long has stalled."""
LENS_SECONDS = 120.0
MOVE_SECONDS = 600.0
SWITCH_SECONDS = 10.0
STATE_SECONDS = 5.0
FORWARD_SECONDS = 3600.0
"""For forwards; the caller's own deadline ends them earlier."""
_TRY_AGAIN = frozenset({"DEVICE_OOM", "ALREADY_LOADING"})
"""Reasons that may be gone at the next attempt, although their codes do not say so."""


class GrpcModelHosts:
    """Implements ModelHosts."""

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._open_channel = open_channel
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to an address."""
        if address not in self._channels:
            self._channels[address] = self._open_channel(address)
        return self._channels[address]

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()

    async def inspect(self, address: str, source: Source) -> Facts:
        """What a model's files hold."""
        request = pb.InspectRequest(source=_source(source))
        with translated():
            found = await self._stub(address).Inspect(request, timeout=READ_SECONDS)
        return Facts(**to_dict(found))

    async def estimate(self, address: str, source: Source, quantization: str) -> Need:
        """What a load would need."""
        request = to_message(pb.EstimateRequest, {"quantization": quantization}, source=_source(source))
        with translated():
            found = await self._stub(address).Estimate(request, timeout=READ_SECONDS)
        return Need(**to_dict(found.breakdown))

    async def load(
        self,
        address: str,
        model_id: str,
        source: Source,
        quantization: str,
        *,
        digest: str,
        fingerprint: str,
        parked: bool = False,
    ) -> AsyncGenerator[LoadStep]:
        """Load; the call is cancelled when the iteration ends early."""
        request = to_message(
            pb.LoadRequest,
            {
                "model_id": model_id,
                "quantization": quantization,
                "expected_digest": digest,
                "expected_fingerprint": fingerprint,
                "parked": parked,
            },
            source=_source(source),
        )
        call = self._stub(address).Load(request)
        try:
            with translated():
                while True:
                    async with asyncio.timeout(STALL_SECONDS):
                        message = await call.read()
                    if message is grpc.aio.EOF:
                        return
                    yield _step(message)
        except TimeoutError as error:
            raise errors.Unavailable("The load has stalled", transient=True) from error
        finally:
            call.cancel()

    async def unload(self, address: str, model_id: str, wait_seconds: float) -> int:
        """Take a model off."""
        request = pb.UnloadRequest(model_id=model_id, wait_seconds=wait_seconds)
        with translated():
            return (await self._stub(address).Unload(request, timeout=wait_seconds + LENS_SECONDS)).freed_bytes

    async def park(self, address: str, model_id: str) -> int:
        """Move a model to host memory."""
        with translated():
            found = await self._stub(address).Park(pb.ParkRequest(model_id=model_id), timeout=MOVE_SECONDS)
        return found.freed_bytes

    async def restore(self, address: str, model_id: str) -> HostedModel:
        """Move a parked model back."""
        with translated():
            return hosted(await self._stub(address).Restore(pb.RestoreRequest(model_id=model_id), timeout=MOVE_SECONDS))

    async def attach_lens(
        self, address: str, model_id: str, lens_id: str, kind: str, artifact: LensArtifact, *, parked: bool = False
    ) -> int:
        """Bring a lens to a resident model, or to a parked one."""
        request = pb.AttachLensRequest(model_id=model_id, lens=_lens(lens_id, kind, artifact), parked=parked)
        with translated():
            return (await self._stub(address).AttachLens(request, timeout=LENS_SECONDS)).memory_bytes

    async def detach_lens(self, address: str, model_id: str, lens_id: str, *, park: bool = False) -> None:
        """Take a lens off, to park it or for good."""
        request = pb.DetachLensRequest(model_id=model_id, lens_id=lens_id, park=park)
        with translated():
            await self._stub(address).DetachLens(request, timeout=LENS_SECONDS)

    async def switch_lens(self, address: str, model_id: str, lens_id: str | None) -> Switched:
        """Make a lens the active one."""
        request = pb.SwitchLensRequest(model_id=model_id, lens_id=lens_id)
        with translated():
            return Switched(**to_dict(await self._stub(address).SwitchLens(request, timeout=SWITCH_SECONDS)))

    async def analyze(self, address: str, model_id: str, lens_ids: Sequence[str], query: Mapping[str, Any]) -> Any:
        """Read a text through lenses; the answer as it came."""
        request = to_message(pb.AnalyzeRequest, query, model_id=model_id, lens_ids=lens_ids)
        with translated():
            return await self._stub(address).Analyze(request, timeout=FORWARD_SECONDS)

    async def generate(
        self, address: str, model_id: str, query: Mapping[str, Any], extension: tuple[str, LensArtifact] | None
    ) -> Any:
        """Continue a prompt; the answer as it came."""
        request = to_message(pb.GenerateRequest, query, model_id=model_id, extension=None)
        if extension is not None:
            request.extension.CopyFrom(_lens(extension[0], "extension", extension[1]))
        with translated():
            return await self._stub(address).Generate(request, timeout=FORWARD_SECONDS)

    async def measure_perplexity(
        self, address: str, model_id: str, dataset_id: str, sample_count: int, max_length: int
    ) -> dict[str, Any]:
        """Perplexity on a dataset."""
        request = pb.MeasurePerplexityRequest(
            model_id=model_id, dataset_id=dataset_id, sample_count=sample_count, max_length=max_length
        )
        with translated():
            return to_dict(await self._stub(address).MeasurePerplexity(request, timeout=FORWARD_SECONDS))

    async def forget(self, address: str, source: Source, digest: str) -> None:
        """Delete what the host's disk keeps of a model."""
        request = pb.ForgetRequest(source=_source(source), digest=digest)
        with translated():
            await self._stub(address).Forget(request, timeout=LENS_SECONDS)

    async def empty_cache(self, address: str) -> int:
        """Empty the allocator's cache."""
        with translated():
            return (await self._stub(address).EmptyCache(pb.EmptyCacheRequest(), timeout=LENS_SECONDS)).freed_bytes

    async def state(self, address: str) -> tuple[str, list[HostedModel]]:
        """Everything on the device, now."""
        with translated():
            found = await self._stub(address).GetState(pb.GetStateRequest(), timeout=STATE_SECONDS)
        return found.incarnation, [hosted(model) for model in found.models]

    def _stub(self, address: str) -> residency_pb2_grpc.ModelHostServiceStub:
        return residency_pb2_grpc.ModelHostServiceStub(self.channel(address))


@contextmanager
def translated() -> Iterator[None]:
    """A failed call is raised as the error that the other side raised.

    Raises:
        errors.LensmeshError: with its reason and facts; transient when another attempt may succeed.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        known = from_rpc_error(error)
        known.transient = known.transient or known.reason in _TRY_AGAIN
        raise known from None


def _source(source: Source) -> pb.SourceSpec:
    return to_message(pb.SourceSpec, source)


def _lens(lens_id: str, kind: str, artifact: LensArtifact) -> types_pb2.LensSpec:
    return to_message(types_pb2.LensSpec, artifact, lens_id=lens_id, kind=kind, artifact_uri=artifact.uri)


def _step(message: pb.LoadProgress) -> LoadStep:
    fields = to_dict(message)
    fields["model"] = hosted(message.model) if message.HasField("model") else None
    return LoadStep(**fields)
