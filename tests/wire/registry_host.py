"""A host process that only pretends to hold models, and knows transcoders and extensions: no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.extensions.v1 import extensions_pb2, extensions_pb2_grpc
from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc
from lensmesh.registry.v1 import devices_pb2
from lensmesh.residency.v1 import residency_pb2 as host_pb
from lensmesh.residency.v1 import residency_pb2_grpc
from lensmesh.training.v1 import training_pb2, training_pb2_grpc

from services.kit import errors

MB = 1_000_000
CONFIG = {"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 4, "architectures": ["GPT2LMHeadModel"]}


def weight(model: devices_pb2.HostedModel) -> int:
    """Bytes with its lenses, without those that are parked alone."""
    return model.memory_bytes + sum(lens.memory_bytes for lens in model.lenses if not lens.parked)


async def _at_once(extension_id: str) -> None:
    """Nothing."""


@dataclass
class FakeHost(
    residency_pb2_grpc.ModelHostServiceServicer,
    training_pb2_grpc.TrainingServiceServicer,
    extensions_pb2_grpc.ExtensionServiceServicer,
    extraction_pb2_grpc.ExtractionServiceServicer,
):
    """One host process: what it holds, what it was asked, and how it is to fail."""

    host_id: str = "device-0"
    device: str = "cpu"
    accelerator: str = ""
    incarnation: str = "life-1"
    budget: int = 1000 * MB
    park: int = 0
    """Bytes of host memory for parked models."""
    refuses_to_park: bool = False
    services: tuple[str, ...] = ("extraction", "training", "extensions")
    sizes: dict[str, int] = field(default_factory=lambda: {"tiny": 100 * MB})
    """Bytes of the weights by identifier; int8 takes half."""
    held: dict[str, devices_pb2.HostedModel] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    load_errors: list[Exception] = field(default_factory=list)
    """Raised by the next loads, one each, in the middle."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Loads stop half way until it is set, and so do parking and restoring."""
    loading: int = 0
    most_loading: int = 0
    hub_down: bool = False
    step: int = 25
    """Percent between the progress messages of a load."""
    lens_error: Exception | None = None
    lens_fails_always: bool = True
    """Whether the error comes at every attach, and not at the next one only."""
    perplexity: float = 12.5
    measures: types.Quantization = types.QUANTIZATION_NONE
    transcoders: dict[str, training_pb2.Transcoder] = field(default_factory=dict)
    extensions: dict[str, extensions_pb2.Extension] = field(default_factory=dict)
    before_delete: Callable[[str], Awaitable[None]] = _at_once
    """What the deletion of an extension does before it is gone."""
    address: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    def names(self, method: str) -> list[Any]:
        """Requests of one method."""
        return [request for name, request in self.asked if name == method]

    async def Inspect(self, request: Any, context: Any) -> Any:
        self.asked.append(("Inspect", request))
        if request.source.source == types.MODEL_SOURCE_HUGGINGFACE and self.hub_down:
            raise errors.Unavailable("the hub does not answer")
        if request.source.identifier not in self.sizes:
            raise errors.Invalid.of("model_identifier", "names no model here")
        config = Struct()
        config.update(CONFIG)
        size = self.sizes[request.source.identifier]
        return host_pb.ModelFacts(
            config=config,
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            parameter_count=size // 4,
            hidden_size=64,
            num_layers=4,
            vocab_size=1000,
            context_length=128,
            file_bytes=size,
            digest="digest-" + request.source.identifier,
            defaults=types.ModelDefaults(
                dict_size=1024,
                group_sizes=[512, 512],
                top_k=32,
                dtype=types.DTYPE_FLOAT32,
                hook_points=[types.HookPoint(site="mlp_in", name="blocks.{layer}.mlp.hook_in")],
                experimental=True,
            ),
        )

    def bytes_of(self, identifier: str, quantization: int) -> int:
        return self.sizes[identifier] // (2 if quantization == types.QUANTIZATION_INT8 else 1)

    async def Estimate(self, request: Any, context: Any) -> Any:
        weights = self.bytes_of(request.source.identifier, request.quantization)
        breakdown = types.MemoryBreakdown(weights=weights, activations=10 * MB, overhead=0, quantization_state=0)
        return host_pb.MemoryEstimate(required_bytes=weights + 10 * MB, breakdown=breakdown)

    async def Load(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(("Load", request))
        total = self.bytes_of(request.source.identifier, request.quantization)
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        try:
            for percent in range(0, 100, self.step):
                if percent == 50:
                    if self.load_errors:
                        raise self.load_errors.pop(0)
                    await self.gate.wait()
                yield host_pb.LoadProgress(
                    percent=percent, bytes_done=total * percent // 100, bytes_total=total, message="Reading weights"
                )
        finally:
            self.loading -= 1
        self.held[request.model_id] = devices_pb2.HostedModel(
            model_id=request.model_id,
            quantization=request.quantization,
            memory_bytes=total,
            fingerprint=f"fp-{request.model_id}-{request.quantization}",
            parked=request.parked,
        )
        yield host_pb.LoadProgress(
            percent=100,
            bytes_done=total,
            bytes_total=total,
            message="Ready",
            model=self.held[request.model_id],
            seconds=1.5,
            digest="digest-" + request.source.identifier,
        )

    async def Unload(self, request: Any, context: Any) -> Any:
        self.asked.append(("Unload", request))
        model = self.held.get(request.model_id)
        if model is not None and model.leases:
            raise errors.Conflict("leases are held", reason="IN_USE")
        self.held.pop(request.model_id, None)
        return host_pb.Released(freed_bytes=model.memory_bytes if model else 0)

    async def Park(self, request: Any, context: Any) -> Any:
        self.asked.append(("Park", request))
        model = self.held[request.model_id]
        if model.leases:
            raise errors.Conflict("leases are held", reason="IN_USE")
        await self.gate.wait()
        self.require_parking(weight(model))
        model.parked = True
        return host_pb.Released(freed_bytes=model.memory_bytes)

    @property
    def parked_bytes(self) -> int:
        """Bytes of parked models, and of lenses that are parked alone."""
        alone = (lens.memory_bytes for model in self.held.values() for lens in model.lenses if lens.parked)
        return sum(weight(held) for held in self.held.values() if held.parked) + sum(alone)

    def require_parking(self, size: int) -> None:
        if self.refuses_to_park or size > self.park - self.parked_bytes:
            raise errors.Exhausted("host memory is full", reason="INSUFFICIENT_MEMORY")

    async def Restore(self, request: Any, context: Any) -> Any:
        self.asked.append(("Restore", request))
        await self.gate.wait()
        self.held[request.model_id].parked = False
        return self.held[request.model_id]

    async def AttachLens(self, request: Any, context: Any) -> Any:
        self.asked.append(("AttachLens", request))
        if self.lens_error is not None:
            error, self.lens_error = self.lens_error, self.lens_error if self.lens_fails_always else None
            raise error
        lens = devices_pb2.HostedLens(lens_id=request.lens.lens_id, memory_bytes=7 * MB)
        lenses = self.held[request.model_id].lenses
        if all(other.lens_id != lens.lens_id for other in lenses):
            lenses.append(lens)
        for other in lenses:
            other.parked = other.parked and other.lens_id != lens.lens_id
        return lens

    async def DetachLens(self, request: Any, context: Any) -> Any:
        self.asked.append(("DetachLens", request))
        model = self.held[request.model_id]
        if any(lens.lens_id == request.lens_id and lens.leases for lens in model.lenses):
            raise errors.Conflict("calls use the lens", reason="IN_USE")
        if request.park:
            self.require_parking(7 * MB)
            next(lens for lens in model.lenses if lens.lens_id == request.lens_id).parked = True
            return host_pb.Released(freed_bytes=7 * MB)
        kept = [lens for lens in model.lenses if lens.lens_id != request.lens_id]
        del model.lenses[:]
        model.lenses.extend(kept)
        return host_pb.Released(freed_bytes=7 * MB)

    async def SwitchLens(self, request: Any, context: Any) -> Any:
        self.asked.append(("SwitchLens", request))
        model = self.held[request.model_id]
        if request.lens_id and all(lens.lens_id != request.lens_id or lens.parked for lens in model.lenses):
            raise errors.NotFound("the lens is not attached")
        model.active_lens_id = request.lens_id
        return host_pb.Switched(seconds=0.002, memory_before_bytes=5, memory_after_bytes=6)

    async def Analyze(self, request: Any, context: Any) -> Any:
        self.asked.append(("Analyze", request))
        readings = [types.LensReading(lens_id=lens_id, fvu=0.25) for lens_id in request.lens_ids]
        return host_pb.AnalyzeResponse(readings=readings, seconds=0.5)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.asked.append(("Generate", request))
        return types.GeneratedText(text=request.prompt + "!", token_ids=[1, 2])

    async def MeasurePerplexity(self, request: Any, context: Any) -> Any:
        self.asked.append(("MeasurePerplexity", request))
        return types.PerplexityResult(
            perplexity=self.perplexity,
            loss=2.5,
            tokens=640,
            samples=request.sample_count,
            quantization=self.measures,
        )

    async def Forget(self, request: Any, context: Any) -> Any:
        self.asked.append(("Forget", request))
        return host_pb.Released(freed_bytes=1)

    async def EmptyCache(self, request: Any, context: Any) -> Any:
        return host_pb.Released(freed_bytes=3 * MB)

    async def GetState(self, request: Any, context: Any) -> Any:
        return host_pb.HostState(incarnation=self.incarnation, models=self.held.values())

    async def GetTranscoder(self, request: Any, context: Any) -> Any:
        if request.id not in self.transcoders:
            raise errors.NotFound(f"There is no transcoder {request.id}")
        return self.transcoders[request.id]

    async def ListTranscoders(self, request: Any, context: Any) -> Any:
        mine = [item for item in self.transcoders.values() if item.model_id == request.model_id]
        return training_pb2.ListTranscodersResponse(transcoders=mine, total=len(mine))

    async def DeleteTranscoder(self, request: Any, context: Any) -> Any:
        del self.transcoders[request.id]
        return Empty()

    async def GetExtension(self, request: Any, context: Any) -> Any:
        if request.id not in self.extensions:
            raise errors.NotFound(f"There is no extension {request.id}")
        return self.extensions[request.id]

    async def ListExtensions(self, request: Any, context: Any) -> Any:
        mine = [item for item in self.extensions.values() if item.model_id == request.model_id]
        return extensions_pb2.ListExtensionsResponse(extensions=mine, total=len(mine))

    async def DeleteExtension(self, request: Any, context: Any) -> Any:
        await self.before_delete(request.id)
        del self.extensions[request.id]
        return Empty()

    async def ListActivationCaches(self, request: Any, context: Any) -> Any:
        return extraction_pb2.ListActivationCachesResponse()
