"""lensmesh.residency.v1.ModelHostService: proto in, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from google.protobuf.message import Message
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import devices_pb2
from lensmesh.residency.v1 import residency_pb2, residency_pb2_grpc

from services.residency import messages
from services.residency.intervention import Intervention
from services.residency.lenses.features import FeatureLens
from services.residency.operations import Asked, Host, Wanted
from services.residency.reading import decoded


class ModelHostServicer(residency_pb2_grpc.ModelHostServiceServicer):
    """The weights of this process."""

    def __init__(self, host: Host, incarnation: str) -> None:
        self._host = host
        self._pool = host.pool
        self._incarnation = incarnation

    async def Inspect(self, request: residency_pb2.InspectRequest, context: Any) -> residency_pb2.ModelFacts:
        """Config, headers and digest of a model's files."""
        found = await self._host.inspect(messages.source(request.source))
        return await self._pool.run(messages.model_facts, found)

    async def Estimate(self, request: residency_pb2.EstimateRequest, context: Any) -> residency_pb2.MemoryEstimate:
        """What a load would need."""
        quantization = messages.QUANTIZATIONS[request.quantization]
        return messages.memory_estimate(await self._host.estimate(messages.source(request.source), quantization))

    async def Load(self, request: residency_pb2.LoadRequest, context: Any) -> AsyncIterator[residency_pb2.LoadProgress]:
        """Load a model, with progress."""
        steps = self._host.load(
            request.model_id,
            messages.source(request.source),
            messages.QUANTIZATIONS[request.quantization],
            digest=request.expected_digest,
            fingerprint=request.expected_fingerprint,
            parked=request.parked,
        )
        async for step in steps:
            yield messages.load_progress(step)

    async def Unload(self, request: residency_pb2.UnloadRequest, context: Any) -> residency_pb2.Released:
        """Take a model and its lenses away."""
        freed = await self._pool.unload(request.model_id, request.wait_seconds)
        return residency_pb2.Released(freed_bytes=freed)

    async def Park(self, request: residency_pb2.ParkRequest, context: Any) -> residency_pb2.Released:
        """Move a model to host memory."""
        return residency_pb2.Released(freed_bytes=await self._pool.park(request.model_id))

    async def Restore(self, request: residency_pb2.RestoreRequest, context: Any) -> devices_pb2.HostedModel:
        """Move a parked model back."""
        with self._host.metrics.watching():
            return messages.hosted_model(await self._pool.restore(request.model_id))

    async def AttachLens(self, request: residency_pb2.AttachLensRequest, context: Any) -> devices_pb2.HostedLens:
        """Bring a lens to a resident model."""
        with self._host.metrics.watching():
            spec, uri = messages.lens_spec(request.lens), request.lens.artifact_uri
            await self._host.attach(request.model_id, spec, uri, parked=request.parked)
        return messages.hosted_lens(self._pool.get(request.model_id).lenses[request.lens.lens_id])

    async def DetachLens(self, request: residency_pb2.DetachLensRequest, context: Any) -> residency_pb2.Released:
        """Take a lens off, to park it or for good."""
        with self._host.metrics.watching():
            freed = await self._pool.detach(request.model_id, request.lens_id, park=request.park)
        return residency_pb2.Released(freed_bytes=freed)

    async def SwitchLens(self, request: residency_pb2.SwitchLensRequest, context: Any) -> residency_pb2.Switched:
        """Make a lens the active one."""
        before = self._pool.used_bytes
        seconds = await self._host.switch(request.model_id, request.lens_id or None)
        return residency_pb2.Switched(
            seconds=seconds, memory_before_bytes=before, memory_after_bytes=self._pool.used_bytes
        )

    async def Analyze(self, request: residency_pb2.AnalyzeRequest, context: Any) -> residency_pb2.AnalyzeResponse:
        """Read a text through attached lenses."""
        changes = self._interventions(request.model_id, request.interventions)
        asked = Asked(request.text, request.token_ids, request.top_k, request.prefix, changes)
        analyze = partial(self._host.analyze, request.model_id, request.lens_ids, asked)
        found = await self._host.making_room(request.model_id, analyze)
        ids, readings, seconds = found.token_ids, found.readings, found.seconds
        tokenizer = self._pool.get(request.model_id).tokenizer
        known = decoded({*ids, *(t for _, each in readings for t in messages.tokens_named(each))}, tokenizer)
        return residency_pb2.AnalyzeResponse(
            readings=[messages.lens_reading(spec, each, ids, known) for spec, each in readings], seconds=seconds
        )

    async def Encode(self, request: residency_pb2.EncodeRequest, context: Any) -> types_pb2.LensReading:
        """Read a text through a transcoder."""
        asked = Asked(request.text, request.token_ids, request.top_k, request.prefix)
        encode = partial(self._host.encode, request.model_id, request.artifact_uri, asked)
        found = await self._host.making_room(request.model_id, encode)
        known = decoded(found.token_ids, self._pool.get(request.model_id).tokenizer)
        spec, each = found.readings[0]
        return messages.lens_reading(spec, each, found.token_ids, known)

    async def Generate(self, request: residency_pb2.GenerateRequest, context: Any) -> types_pb2.GeneratedText:
        """Continue a prompt."""
        generate = partial(self._host.generate, self._wanted(request))
        return messages.generated(await self._host.making_room(request.model_id, generate))

    async def GenerateStream(
        self, request: residency_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[types_pb2.GeneratedText]:
        """Continue a prompt, telling every token as it comes."""
        begin = partial(self._host.begin_stream, self._wanted(request))
        part, rest = await self._host.making_room(request.model_id, begin)
        async with aclosing(rest):
            while part is not None:
                yield messages.generated(part)
                part = await anext(rest, None)

    async def GenerateTogether(
        self, request: residency_pb2.GenerateTogetherRequest, context: Any
    ) -> residency_pb2.GenerateTogetherResponse:
        """Continue several prompts in the same forward passes."""
        generate = partial(self._host.generate_together, [self._wanted(each) for each in request.requests])
        made = await self._host.making_room(request.requests[0].model_id, generate)
        return residency_pb2.GenerateTogetherResponse(texts=[messages.generated(each) for each in made])

    def _wanted(self, request: residency_pb2.GenerateRequest) -> Wanted:
        named = request.extension if request.HasField("extension") else None
        return Wanted(
            model_id=request.model_id,
            prompt=request.prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            extension=(messages.lens_spec(named), named.artifact_uri) if named is not None else None,
            interventions=self._interventions(request.model_id, request.interventions),
        )

    def _interventions(self, model_id: str, asked: Iterable[types_pb2.InterventionSpec]) -> list[Intervention]:
        lenses = self._pool.get(model_id).lenses
        coders = {key: item.lens.splicing for key, item in lenses.items() if isinstance(item.lens, FeatureLens)}
        return [messages.intervention(each, coders) for each in asked]

    async def MeasurePerplexity(
        self, request: residency_pb2.MeasurePerplexityRequest, context: Any
    ) -> types_pb2.PerplexityResult:
        """Measure the base on a dataset."""
        resident = self._pool.get(request.model_id)
        asked = (request.model_id, request.dataset_id, request.sample_count, request.max_length)
        found = await self._host.making_room(request.model_id, partial(self._host.measure_perplexity, *asked))
        return messages.perplexity_result(found, resident.quantization)

    async def Forget(self, request: residency_pb2.ForgetRequest, context: Any) -> residency_pb2.Released:
        """Delete what the disk keeps of a model."""
        source = messages.source(request.source)
        hub_id = source.identifier if source.kind == "huggingface" else ""
        freed = await self._pool.read(self._host.disk_cache.forget, request.digest, hub_id)
        if source.kind == "local":
            await self._host.forget_made(source.identifier)
        return residency_pb2.Released(freed_bytes=freed)

    async def EmptyCache(self, request: Message, context: Any) -> residency_pb2.Released:
        """Give freed memory back."""
        return residency_pb2.Released(freed_bytes=await self._host.empty_cache())

    async def GetState(self, request: Message, context: Any) -> residency_pb2.HostState:
        """Everything on the device."""
        return messages.host_state(self._pool, self._incarnation)
