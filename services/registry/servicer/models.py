"""lensmesh.registry.v1.ModelService: proto in, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty
from lensmesh.common.v1 import types_pb2
from lensmesh.events.v1 import events_pb2
from lensmesh.registry.v1 import models_pb2 as pb
from lensmesh.registry.v1 import models_pb2_grpc

from services.kit.idempotency import request_key
from services.registry.domain import LoadPlan, Model
from services.registry.operations import estimating, loading, models, serving, unloading
from services.registry.operations.registry import Registry
from services.registry.servicer.calls import caller, page, page_fields
from services.registry.servicer.events import Feeds
from services.registry.wire import to_dict, to_message

_NEW = ("name", "model_type", "source", "model_identifier", "revision", "pinned", "preload")
_QUERY = ("prompt", "max_new_tokens", "temperature", "interventions", "seed")


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """The catalogue of models."""

    def __init__(self, registry: Registry, feeds: Feeds) -> None:
        self._registry = registry
        self._feeds = feeds

    async def CreateModel(self, request: pb.CreateModelRequest, context: Any) -> pb.Model:
        """Register a model, or say what a load of it would do."""
        fields = to_dict(request)
        new = models.NewModel(**{n: fields[n] for n in _NEW}, quantization=fields["quantization"] or "none")
        if request.validate_only:
            return _draft(await models.draft_model(self._registry, new))
        key = request_key("CreateModel", request)
        return model_message(await models.create_model(self._registry, caller(), new, key, auto_load=request.auto_load))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        """One model."""
        return model_message(await models.get_model(self._registry, request.id))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Models, newest first."""
        wanted = page(request)
        status, model_type = to_dict(request)["status"] or None, request.model_type or None
        listed = await models.list_models(self._registry, wanted, status, model_type)
        rows = [model_message(model) for model in listed.rows]
        return pb.ListModelsResponse(models=rows, **page_fields(listed))

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Any) -> pb.Model:
        """Change a model."""
        fields = to_dict(request)
        return model_message(await models.update_model(self._registry, fields.pop("id"), **fields))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> Empty:
        """Delete a model."""
        await models.delete_model(self._registry, caller(), request.id, cascade=request.cascade)
        return Empty()

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """Start to load a model, or say what that would do."""
        wish: dict[str, Any] = {
            "quantization": to_dict(request)["quantization"] or None,
            "device": request.device,
            "fall_back": request.fallback == pb.FALLBACK_CPU,
        }
        if request.validate_only:
            return _started(await loading.plan_of_load(self._registry, request.id, **wish))
        key = request_key("LoadModel", request)
        return _started(await loading.load_model(self._registry, caller(), request.id, key, **wish))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.Model:
        """Take a model off its devices."""
        return model_message(await unloading.unload_model(self._registry, request.id, request.wait_seconds))

    async def MoveModel(self, request: pb.MoveModelRequest, context: Any) -> pb.LoadModelResponse:
        """Start to move a model."""
        key = request_key("MoveModel", request)
        return _started(await loading.move_model(self._registry, caller(), request.id, request.device, key))

    async def EstimateModel(self, request: pb.EstimateModelRequest, context: Any) -> types_pb2.LoadPlan:
        """What a load would need."""
        quantization = to_dict(request)["quantization"] or None
        return plan_message(await estimating.estimate_model(self._registry, request.id, quantization, request.device))

    async def MeasurePerplexity(self, request: pb.MeasurePerplexityRequest, context: Any) -> types_pb2.PerplexityResult:
        """Measure a loaded model on a dataset."""
        found = await serving.measure_perplexity(
            self._registry, request.id, request.dataset_id, request.sample_count, request.max_length
        )
        return to_message(types_pb2.PerplexityResult, found)

    async def GenerateText(self, request: pb.GenerateTextRequest, context: Any) -> types_pb2.GeneratedText:
        """Continue a prompt."""
        fields = to_dict(request)
        query = {name: fields[name] for name in _QUERY}
        return await serving.generate(self._registry, request.id, query, request.extension_id)

    async def WatchModel(self, request: pb.WatchModelRequest, context: Any) -> AsyncIterator[events_pb2.Event]:
        """A snapshot, then the model's events."""
        model = await models.get_model(self._registry, request.id)
        async for event in self._feeds.of_model(model_message(model), request.after_sequence):
            yield event


def model_message(model: Model, **more: Any) -> pb.Model:
    """A model as clients see it."""
    return to_message(pb.Model, model, **more)


def plan_message(plan: LoadPlan) -> types_pb2.LoadPlan:
    """A plan as clients see it."""
    placements = [
        to_message(types_pb2.Placement, placement, available_memory_bytes=max(0, placement.available_bytes))
        for placement in plan.placements
    ]
    return to_message(
        types_pb2.LoadPlan,
        plan,
        required_memory_bytes=plan.need.total,
        breakdown=plan.need,
        placements=placements,
    )


def _draft(draft: models.Draft) -> pb.Model:
    plan = plan_message(draft.plan) if draft.plan is not None else None
    fields: dict[str, Any] = {} if draft.facts is None else estimating.columns_of(draft.facts)
    if draft.plan is not None:
        fields["estimated_memory_bytes"] = draft.plan.need.total
        fields["estimated_load_seconds"] = draft.plan.estimated_seconds
    revision = draft.new.revision or None
    return to_message(pb.Model, draft.new, **fields, status="pending", revision=revision, plan=plan)


def _started(started: loading.Started) -> pb.LoadModelResponse:
    plan = plan_message(started.plan) if started.plan is not None else None
    return to_message(pb.LoadModelResponse, started, id=started.model_id, plan=plan)
