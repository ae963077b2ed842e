from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from lensmesh.common.v1 import types_pb2 as _types_pb2
from lensmesh.http.v1 import http_pb2 as _http_pb2
from lensmesh.registry.v1 import devices_pb2 as _devices_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SourceSpec(_message.Message):
    __slots__ = ("source", "identifier", "revision")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    source: _types_pb2.ModelSource
    identifier: str
    revision: str
    def __init__(self, source: _Optional[_Union[_types_pb2.ModelSource, str]] = ..., identifier: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: SourceSpec
    def __init__(self, source: _Optional[_Union[SourceSpec, _Mapping]] = ...) -> None: ...

class ModelFacts(_message.Message):
    __slots__ = ("config", "model_type", "architecture", "parameter_count", "hidden_size", "num_layers", "vocab_size", "context_length", "file_bytes", "digest", "defaults")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    config: _struct_pb2.Struct
    model_type: str
    architecture: str
    parameter_count: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    context_length: int
    file_bytes: int
    digest: str
    defaults: _types_pb2.ModelDefaults
    def __init__(self, config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., model_type: _Optional[str] = ..., architecture: _Optional[str] = ..., parameter_count: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., file_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., defaults: _Optional[_Union[_types_pb2.ModelDefaults, _Mapping]] = ...) -> None: ...

class EstimateRequest(_message.Message):
    __slots__ = ("source", "quantization")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    source: SourceSpec
    quantization: _types_pb2.Quantization
    def __init__(self, source: _Optional[_Union[SourceSpec, _Mapping]] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ...) -> None: ...

class MemoryEstimate(_message.Message):
    __slots__ = ("required_bytes", "breakdown")
    REQUIRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BREAKDOWN_FIELD_NUMBER: _ClassVar[int]
    required_bytes: int
    breakdown: _types_pb2.MemoryBreakdown
    def __init__(self, required_bytes: _Optional[int] = ..., breakdown: _Optional[_Union[_types_pb2.MemoryBreakdown, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("model_id", "source", "quantization", "expected_digest", "expected_fingerprint", "parked")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    source: SourceSpec
    quantization: _types_pb2.Quantization
    expected_digest: str
    expected_fingerprint: str
    parked: bool
    def __init__(self, model_id: _Optional[str] = ..., source: _Optional[_Union[SourceSpec, _Mapping]] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., expected_digest: _Optional[str] = ..., expected_fingerprint: _Optional[str] = ..., parked: _Optional[bool] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("percent", "bytes_done", "bytes_total", "message", "model", "seconds", "digest")
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    percent: float
    bytes_done: int
    bytes_total: int
    message: str
    model: _devices_pb2.HostedModel
    seconds: float
    digest: str
    def __init__(self, percent: _Optional[float] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., message: _Optional[str] = ..., model: _Optional[_Union[_devices_pb2.HostedModel, _Mapping]] = ..., seconds: _Optional[float] = ..., digest: _Optional[str] = ...) -> None: ...

class ParkRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("source", "digest")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    source: SourceSpec
    digest: str
    def __init__(self, source: _Optional[_Union[SourceSpec, _Mapping]] = ..., digest: _Optional[str] = ...) -> None: ...

class EmptyCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("model_id", "wait_seconds")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    wait_seconds: float
    def __init__(self, model_id: _Optional[str] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class AttachLensRequest(_message.Message):
    __slots__ = ("model_id", "lens", "parked")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LENS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    lens: _types_pb2.LensSpec
    parked: bool
    def __init__(self, model_id: _Optional[str] = ..., lens: _Optional[_Union[_types_pb2.LensSpec, _Mapping]] = ..., parked: _Optional[bool] = ...) -> None: ...

class DetachLensRequest(_message.Message):
    __slots__ = ("model_id", "lens_id", "park")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    PARK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    lens_id: str
    park: bool
    def __init__(self, model_id: _Optional[str] = ..., lens_id: _Optional[str] = ..., park: _Optional[bool] = ...) -> None: ...

class SwitchLensRequest(_message.Message):
    __slots__ = ("model_id", "lens_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    lens_id: str
    def __init__(self, model_id: _Optional[str] = ..., lens_id: _Optional[str] = ...) -> None: ...

class Switched(_message.Message):
    __slots__ = ("seconds", "memory_before_bytes", "memory_after_bytes")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BEFORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int
    def __init__(self, seconds: _Optional[float] = ..., memory_before_bytes: _Optional[int] = ..., memory_after_bytes: _Optional[int] = ...) -> None: ...

class AnalyzeRequest(_message.Message):
    __slots__ = ("model_id", "lens_ids", "text", "token_ids", "top_k", "prefix", "interventions")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LENS_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    lens_ids: _containers.RepeatedScalarFieldContainer[str]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    prefix: int
    interventions: _containers.RepeatedCompositeFieldContainer[_types_pb2.InterventionSpec]
    def __init__(self, model_id: _Optional[str] = ..., lens_ids: _Optional[_Iterable[str]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., prefix: _Optional[int] = ..., interventions: _Optional[_Iterable[_Union[_types_pb2.InterventionSpec, _Mapping]]] = ...) -> None: ...

class AnalyzeResponse(_message.Message):
    __slots__ = ("readings", "seconds")
    READINGS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    readings: _containers.RepeatedCompositeFieldContainer[_types_pb2.LensReading]
    seconds: float
    def __init__(self, readings: _Optional[_Iterable[_Union[_types_pb2.LensReading, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("model_id", "artifact_uri", "text", "token_ids", "top_k", "prefix")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    artifact_uri: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    prefix: int
    def __init__(self, model_id: _Optional[str] = ..., artifact_uri: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., prefix: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model_id", "prompt", "max_new_tokens", "temperature", "extension", "interventions", "seed")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    prompt: str
    max_new_tokens: int
    temperature: float
    extension: _types_pb2.LensSpec
    interventions: _containers.RepeatedCompositeFieldContainer[_types_pb2.InterventionSpec]
    seed: int
    def __init__(self, model_id: _Optional[str] = ..., prompt: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., extension: _Optional[_Union[_types_pb2.LensSpec, _Mapping]] = ..., interventions: _Optional[_Iterable[_Union[_types_pb2.InterventionSpec, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class GenerateTogetherRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[GenerateRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[GenerateRequest, _Mapping]]] = ...) -> None: ...

class GenerateTogetherResponse(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedCompositeFieldContainer[_types_pb2.GeneratedText]
    def __init__(self, texts: _Optional[_Iterable[_Union[_types_pb2.GeneratedText, _Mapping]]] = ...) -> None: ...

class MeasurePerplexityRequest(_message.Message):
    __slots__ = ("model_id", "dataset_id", "sample_count", "max_length")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    dataset_id: str
    sample_count: int
    max_length: int
    def __init__(self, model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., sample_count: _Optional[int] = ..., max_length: _Optional[int] = ...) -> None: ...

class HostState(_message.Message):
    __slots__ = ("incarnation", "models", "used_bytes", "budget_bytes")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    models: _containers.RepeatedCompositeFieldContainer[_devices_pb2.HostedModel]
    used_bytes: int
    budget_bytes: int
    def __init__(self, incarnation: _Optional[str] = ..., models: _Optional[_Iterable[_Union[_devices_pb2.HostedModel, _Mapping]]] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ...) -> None: ...
