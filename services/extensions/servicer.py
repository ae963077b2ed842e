"""`lensmesh.extensions.v1.ExtensionService`: messages to records and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import fields
from typing import Any

import grpc
from google.api import httpbody_pb2
from google.protobuf import empty_pb2, json_format
from google.protobuf.message import Message
from lensmesh.common.v1 import types_pb2
from lensmesh.extensions.v1 import extensions_pb2 as pb
from lensmesh.extensions.v1 import extensions_pb2_grpc

from services.extensions.domain import (
    Extension,
    Filter,
    Generated,
    Layer,
    Lora,
    NewExtension,
    NewTraining,
    Prompt,
    Switch,
)
from services.extensions.exchanging import Exchange
from services.extensions.operations import Operations
from services.kit.idempotency import request_key
from services.kit.paging import asked

_OPTIONAL = {"learning_rate", "warmup_steps", "loraplus_lr_ratio"}
"""Fields of a training whose default is not zero."""
_SERVICE = "lensmesh.extensions.v1.ExtensionService"


class ExtensionServicer(extensions_pb2_grpc.ExtensionServiceServicer):
    """Translates; the operations decide."""

    def __init__(self, operations: Operations, exchange: Exchange) -> None:
        self._operations = operations
        self._exchange = exchange

    async def CreateExtension(
        self, request: pb.CreateExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.Extension:
        """See the proto."""
        layers = request.layers or ([request.layer] if request.HasField("layer") else [])
        new = NewExtension(
            model_id=request.model_id,
            task_name=request.task_name,
            kind=_word(pb.ExtensionKind, "EXTENSION_KIND_", request.kind),
            lora=_lora(request.lora) if request.HasField("lora") else None,
            layers=tuple(_layer(layer) for layer in layers),
            freeze_base=request.freeze_base if request.HasField("freeze_base") else True,
            shared_layer_of=request.shared_layer_of,
            train_shared_layer=request.train_shared_layer,
            seed=request.seed,
        )
        key = request_key(f"{_SERVICE}/CreateExtension", request)
        return _extension(await self._operations.create(new, key=key, validate_only=request.validate_only))

    async def GetExtension(self, request: pb.GetExtensionRequest, context: grpc.aio.ServicerContext) -> pb.Extension:
        """See the proto."""
        return _extension(await self._operations.get(request.id))

    async def ListExtensions(
        self, request: pb.ListExtensionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListExtensionsResponse:
        """See the proto."""
        wanted = Filter(model_id=request.model_id, task_name=request.task_name, **asked(request))
        page = await self._operations.list(wanted)
        return pb.ListExtensionsResponse(extensions=[_extension(item) for item in page.items], **page.fields())

    async def DeleteExtension(
        self, request: pb.DeleteExtensionRequest, context: grpc.aio.ServicerContext
    ) -> empty_pb2.Empty:
        """See the proto."""
        await self._operations.delete(request.id)
        return empty_pb2.Empty()

    async def TrainExtension(
        self, request: pb.TrainExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.TrainExtensionResponse:
        """See the proto."""
        job_id = await self._operations.train(
            _training(request), key=request_key(f"{_SERVICE}/TrainExtension", request)
        )
        return pb.TrainExtensionResponse(job_id=job_id, id=request.id)

    async def MergeExtension(
        self, request: pb.MergeExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.MergeExtensionResponse:
        """See the proto."""
        key = request_key(f"{_SERVICE}/MergeExtension", request)
        return pb.MergeExtensionResponse(
            job_id=await self._exchange.merge(request.id, request.name, key=key), id=request.id
        )

    async def ExportExtension(
        self, request: pb.ExportExtensionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """See the proto."""
        async with aclosing(self._exchange.take_out(request.id)) as parts:
            async for part in parts:
                yield httpbody_pb2.HttpBody(content_type="application/zip", data=part)

    async def ImportExtension(
        self, request: pb.ImportExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.Extension:
        """See the proto."""
        key = request_key(f"{_SERVICE}/ImportExtension", request)
        wanted = (request.model_id, request.task_name, request.identifier)
        return _extension(await self._exchange.bring_in(*wanted, key))

    async def ActivateExtension(
        self, request: pb.ActivateExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExtensionSwitch:
        """See the proto."""
        return _switch(request.id, await self._operations.activate(request.id))

    async def DeactivateExtension(
        self, request: pb.DeactivateExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExtensionSwitch:
        """See the proto."""
        return _switch(request.id, await self._operations.deactivate(request.id))

    async def GenerateWithExtension(
        self, request: pb.GenerateWithExtensionRequest, context: grpc.aio.ServicerContext
    ) -> types_pb2.GeneratedText:
        """See the proto."""
        return _generated(await self._operations.generate(request.id, _prompt(request)))

    async def GenerateWithExtensionStream(
        self, request: pb.GenerateWithExtensionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[types_pb2.GeneratedText]:
        """See the proto."""
        async with aclosing(self._operations.generate_stream(request.id, _prompt(request))) as parts:
            async for part in parts:
                yield _generated(part)

    async def GenerateTogether(
        self, request: pb.GenerateTogetherRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateTogetherResponse:
        """See the proto."""
        wanted = [(each.id, _prompt(each)) for each in request.requests]
        made = await self._operations.generate_together(wanted)
        return pb.GenerateTogetherResponse(texts=[_generated(each) for each in made])

    async def EvaluateExtension(
        self, request: pb.EvaluateExtensionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExtensionEvaluation:
        """See the proto."""
        evaluation = await self._operations.evaluate(
            request.id, request.dataset_id, sample_count=request.sample_count, max_length=request.max_length
        )
        return pb.ExtensionEvaluation(
            id=evaluation.extension_id,
            base_loss=evaluation.base_loss,
            loss=evaluation.loss,
            tokens=evaluation.tokens,
            base_unchanged=evaluation.base_unchanged,
        )


def _word(enum: Any, prefix: str, value: int) -> str:
    """The lower-case word of an enum's value; empty for UNSPECIFIED."""
    return enum.Name(value).removeprefix(prefix).lower() if value else ""


def _given(message: Message, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _lora(message: pb.LoraConfig) -> Lora:
    return Lora(
        **_given(message, "r", "alpha", "dropout", "target_r"),
        target_modules=tuple(message.target_modules),
        variant=_word(pb.LoraVariant, "LORA_VARIANT_", message.variant) or "lora",
    )


def _layer(message: pb.LayerConfig) -> Layer:
    return Layer(
        **_given(message, "index", "initialization_scale", "mlp_width"),
        from_step=message.from_step,
        position=_word(pb.LayerPosition, "LAYER_POSITION_", message.position),
    )


def _training(request: pb.TrainExtensionRequest) -> NewTraining:
    words = {"lr_schedule", "precision"}
    same = {field.name for field in fields(NewTraining)} & set(request.DESCRIPTOR.fields_by_name) - words
    return NewTraining(
        extension_id=request.id,
        **{name: getattr(request, name) for name in same - _OPTIONAL},
        **_given(request, *_OPTIONAL),
        lr_schedule=_word(pb.LearningRateSchedule, "LEARNING_RATE_SCHEDULE_", request.lr_schedule),
        precision=_word(pb.Precision, "PRECISION_", request.precision),
    )


def _prompt(request: pb.GenerateWithExtensionRequest) -> Prompt:
    return Prompt(request.prompt, request.max_new_tokens, request.temperature, request.seed)


def _generated(made: Generated) -> types_pb2.GeneratedText:
    return types_pb2.GeneratedText(text=made.text, token_ids=made.token_ids, seconds=made.seconds)


def _switch(extension_id: str, switch: Switch) -> pb.ExtensionSwitch:
    return pb.ExtensionSwitch(
        id=extension_id,
        active=switch.active_extension_id == extension_id,
        seconds=switch.seconds,
        memory_before_bytes=switch.memory_before_bytes,
        memory_after_bytes=switch.memory_after_bytes,
    )


def _extension(extension: Extension) -> pb.Extension:
    message = pb.Extension(
        id=extension.id,
        model_id=extension.model_id,
        task_name=extension.task_name,
        kind=f"EXTENSION_KIND_{extension.kind.upper()}",
        layers=[_layer_message(layer) for layer in extension.layers],
        status=f"EXTENSION_STATUS_{extension.status.upper()}",
        parameter_counts=json_format.ParseDict(dict(extension.parameter_counts), pb.ParameterCounts()),
        artifact_uri=extension.artifact_uri,
        digest=extension.digest,
        size_bytes=extension.size_bytes,
        base_digest=extension.base_digest,
        active=extension.active,
        trained_steps=extension.trained_steps,
        loss_before=extension.loss_before,
        loss_after=extension.loss_after,
        job_id=extension.job_id,
        error_code=extension.error_code,
        error_message=extension.error_message,
        created_by=extension.created_by,
        created_at=extension.created_at,
        freeze_base=extension.freeze_base,
        shared_layer_of=extension.shared_layer_of,
        train_shared_layer=extension.train_shared_layer,
    )
    if extension.lora is not None:
        message.lora.CopyFrom(_lora_message(extension.lora))
    return message


def _lora_message(lora: Lora) -> pb.LoraConfig:
    return pb.LoraConfig(
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        variant=f"LORA_VARIANT_{lora.variant.upper()}",
        target_r=lora.target_r,
    )


def _layer_message(layer: Layer) -> pb.LayerConfig:
    return pb.LayerConfig(
        position=f"LAYER_POSITION_{layer.position.upper() or 'UNSPECIFIED'}",
        index=layer.index,
        initialization_scale=layer.initialization_scale,
        mlp_width=layer.mlp_width,
        from_step=layer.from_step,
    )
