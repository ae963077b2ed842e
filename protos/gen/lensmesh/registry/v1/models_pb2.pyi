import datetime

from buf.validate import validate_pb2 as _validate_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from lensmesh.common.v1 import types_pb2 as _types_pb2
from lensmesh.events.v1 import events_pb2 as _events_pb2
from lensmesh.http.v1 import http_pb2 as _http_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATUS_UNSPECIFIED: _ClassVar[ModelStatus]
    MODEL_STATUS_PENDING: _ClassVar[ModelStatus]
    MODEL_STATUS_LOADING: _ClassVar[ModelStatus]
    MODEL_STATUS_READY: _ClassVar[ModelStatus]
    MODEL_STATUS_FAILED: _ClassVar[ModelStatus]
    MODEL_STATUS_UNLOADED: _ClassVar[ModelStatus]

class Fallback(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FALLBACK_UNSPECIFIED: _ClassVar[Fallback]
    FALLBACK_CPU: _ClassVar[Fallback]
MODEL_STATUS_UNSPECIFIED: ModelStatus
MODEL_STATUS_PENDING: ModelStatus
MODEL_STATUS_LOADING: ModelStatus
MODEL_STATUS_READY: ModelStatus
MODEL_STATUS_FAILED: ModelStatus
MODEL_STATUS_UNLOADED: ModelStatus
FALLBACK_UNSPECIFIED: Fallback
FALLBACK_CPU: Fallback

class Model(_message.Message):
    __slots__ = ("id", "name", "model_type", "architecture", "source", "model_identifier", "revision", "quantization", "status", "progress", "config", "parameter_count", "hidden_size", "num_layers", "vocab_size", "context_length", "memory_usage_bytes", "load_time_seconds", "estimated_memory_bytes", "estimated_load_seconds", "device", "digest", "fingerprint", "error_code", "error_message", "pinned", "preload", "defaults", "perplexities", "created_by", "created_at", "loaded_at", "last_used_at", "updated_at", "etag", "fell_back_to_cpu", "plan")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITIES_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    FELL_BACK_TO_CPU_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    model_type: str
    architecture: str
    source: _types_pb2.ModelSource
    model_identifier: str
    revision: str
    quantization: _types_pb2.Quantization
    status: ModelStatus
    progress: float
    config: _struct_pb2.Struct
    parameter_count: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    context_length: int
    memory_usage_bytes: int
    load_time_seconds: float
    estimated_memory_bytes: int
    estimated_load_seconds: float
    device: str
    digest: str
    fingerprint: str
    error_code: str
    error_message: str
    pinned: bool
    preload: bool
    defaults: _types_pb2.ModelDefaults
    perplexities: _containers.RepeatedCompositeFieldContainer[_types_pb2.PerplexityResult]
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    loaded_at: _timestamp_pb2.Timestamp
    last_used_at: _timestamp_pb2.Timestamp
    updated_at: _timestamp_pb2.Timestamp
    etag: str
    fell_back_to_cpu: bool
    plan: _types_pb2.LoadPlan
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., model_type: _Optional[str] = ..., architecture: _Optional[str] = ..., source: _Optional[_Union[_types_pb2.ModelSource, str]] = ..., model_identifier: _Optional[str] = ..., revision: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., status: _Optional[_Union[ModelStatus, str]] = ..., progress: _Optional[float] = ..., config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., parameter_count: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., memory_usage_bytes: _Optional[int] = ..., load_time_seconds: _Optional[float] = ..., estimated_memory_bytes: _Optional[int] = ..., estimated_load_seconds: _Optional[float] = ..., device: _Optional[str] = ..., digest: _Optional[str] = ..., fingerprint: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., pinned: _Optional[bool] = ..., preload: _Optional[bool] = ..., defaults: _Optional[_Union[_types_pb2.ModelDefaults, _Mapping]] = ..., perplexities: _Optional[_Iterable[_Union[_types_pb2.PerplexityResult, _Mapping]]] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., loaded_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., updated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., etag: _Optional[str] = ..., fell_back_to_cpu: _Optional[bool] = ..., plan: _Optional[_Union[_types_pb2.LoadPlan, _Mapping]] = ...) -> None: ...

class CreateModelRequest(_message.Message):
    __slots__ = ("name", "model_type", "source", "model_identifier", "revision", "quantization", "auto_load", "request_id", "validate_only", "pinned", "preload")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    AUTO_LOAD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_type: str
    source: _types_pb2.ModelSource
    model_identifier: str
    revision: str
    quantization: _types_pb2.Quantization
    auto_load: bool
    request_id: str
    validate_only: bool
    pinned: bool
    preload: bool
    def __init__(self, name: _Optional[str] = ..., model_type: _Optional[str] = ..., source: _Optional[_Union[_types_pb2.ModelSource, str]] = ..., model_identifier: _Optional[str] = ..., revision: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., auto_load: _Optional[bool] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ..., pinned: _Optional[bool] = ..., preload: _Optional[bool] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("id", "read_mask")
    ID_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    id: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, id: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("status", "model_type", "limit", "offset", "page_token", "read_mask")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    status: ModelStatus
    model_type: str
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, status: _Optional[_Union[ModelStatus, str]] = ..., model_type: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "total", "limit", "offset", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateModelRequest(_message.Message):
    __slots__ = ("id", "name", "quantization", "pinned", "preload", "etag")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    quantization: _types_pb2.Quantization
    pinned: bool
    preload: bool
    etag: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., pinned: _Optional[bool] = ..., preload: _Optional[bool] = ..., etag: _Optional[str] = ...) -> None: ...

class DeleteModelRequest(_message.Message):
    __slots__ = ("id", "cascade")
    ID_FIELD_NUMBER: _ClassVar[int]
    CASCADE_FIELD_NUMBER: _ClassVar[int]
    id: str
    cascade: bool
    def __init__(self, id: _Optional[str] = ..., cascade: _Optional[bool] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("id", "quantization", "device", "fallback", "validate_only", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    quantization: _types_pb2.Quantization
    device: str
    fallback: Fallback
    validate_only: bool
    request_id: str
    def __init__(self, id: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., device: _Optional[str] = ..., fallback: _Optional[_Union[Fallback, str]] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("id", "status", "task_id", "message", "plan")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: ModelStatus
    task_id: str
    message: str
    plan: _types_pb2.LoadPlan
    def __init__(self, id: _Optional[str] = ..., status: _Optional[_Union[ModelStatus, str]] = ..., task_id: _Optional[str] = ..., message: _Optional[str] = ..., plan: _Optional[_Union[_types_pb2.LoadPlan, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("id", "wait_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    wait_seconds: float
    def __init__(self, id: _Optional[str] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class MoveModelRequest(_message.Message):
    __slots__ = ("id", "device", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    device: str
    request_id: str
    def __init__(self, id: _Optional[str] = ..., device: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class EstimateModelRequest(_message.Message):
    __slots__ = ("id", "quantization", "device")
    ID_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    id: str
    quantization: _types_pb2.Quantization
    device: str
    def __init__(self, id: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., device: _Optional[str] = ...) -> None: ...

class MeasurePerplexityRequest(_message.Message):
    __slots__ = ("id", "dataset_id", "sample_count", "max_length")
    ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    id: str
    dataset_id: str
    sample_count: int
    max_length: int
    def __init__(self, id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., sample_count: _Optional[int] = ..., max_length: _Optional[int] = ...) -> None: ...

class GenerateTextRequest(_message.Message):
    __slots__ = ("id", "prompt", "max_new_tokens", "temperature", "extension_id", "interventions", "seed")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: str
    max_new_tokens: int
    temperature: float
    extension_id: str
    interventions: _containers.RepeatedCompositeFieldContainer[_types_pb2.InterventionSpec]
    seed: int
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., extension_id: _Optional[str] = ..., interventions: _Optional[_Iterable[_Union[_types_pb2.InterventionSpec, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class WatchModelRequest(_message.Message):
    __slots__ = ("id", "after_sequence")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    after_sequence: int
    def __init__(self, id: _Optional[str] = ..., after_sequence: _Optional[int] = ...) -> None: ...
