from buf.validate import validate_pb2 as _validate_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.api import httpbody_pb2 as _httpbody_pb2
from lensmesh.http.v1 import http_pb2 as _http_pb2
from lensmesh.training.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TranscoderFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSCODER_FORMAT_UNSPECIFIED: _ClassVar[TranscoderFormat]
    TRANSCODER_FORMAT_SAE_LENS: _ClassVar[TranscoderFormat]
    TRANSCODER_FORMAT_SPARSIFY: _ClassVar[TranscoderFormat]
    TRANSCODER_FORMAT_CIRCUIT_TRACER: _ClassVar[TranscoderFormat]
    TRANSCODER_FORMAT_GEMMA_SCOPE: _ClassVar[TranscoderFormat]
    TRANSCODER_FORMAT_NEURONPEDIA: _ClassVar[TranscoderFormat]

class TranscoderSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSCODER_SOURCE_UNSPECIFIED: _ClassVar[TranscoderSource]
    TRANSCODER_SOURCE_LOCAL: _ClassVar[TranscoderSource]
    TRANSCODER_SOURCE_HUGGINGFACE: _ClassVar[TranscoderSource]
TRANSCODER_FORMAT_UNSPECIFIED: TranscoderFormat
TRANSCODER_FORMAT_SAE_LENS: TranscoderFormat
TRANSCODER_FORMAT_SPARSIFY: TranscoderFormat
TRANSCODER_FORMAT_CIRCUIT_TRACER: TranscoderFormat
TRANSCODER_FORMAT_GEMMA_SCOPE: TranscoderFormat
TRANSCODER_FORMAT_NEURONPEDIA: TranscoderFormat
TRANSCODER_SOURCE_UNSPECIFIED: TranscoderSource
TRANSCODER_SOURCE_LOCAL: TranscoderSource
TRANSCODER_SOURCE_HUGGINGFACE: TranscoderSource

class ExportTranscoderRequest(_message.Message):
    __slots__ = ("id", "format", "prefix", "cache_id", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: str
    format: TranscoderFormat
    prefix: int
    cache_id: str
    rows: int
    def __init__(self, id: _Optional[str] = ..., format: _Optional[_Union[TranscoderFormat, str]] = ..., prefix: _Optional[int] = ..., cache_id: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class HeldOutFigures(_message.Message):
    __slots__ = ("l0", "fvu")
    L0_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    l0: float
    fvu: float
    def __init__(self, l0: _Optional[float] = ..., fvu: _Optional[float] = ...) -> None: ...

class ExportedFile(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class TranscoderExport(_message.Message):
    __slots__ = ("transcoder_id", "format", "artifact_uri", "digest", "files", "activation", "thresholds", "wanted_l0", "calibrated_l0", "original", "converted")
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    WANTED_L0_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_L0_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_FIELD_NUMBER: _ClassVar[int]
    CONVERTED_FIELD_NUMBER: _ClassVar[int]
    transcoder_id: str
    format: TranscoderFormat
    artifact_uri: str
    digest: str
    files: _containers.RepeatedCompositeFieldContainer[ExportedFile]
    activation: _training_pb2.Activation
    thresholds: str
    wanted_l0: float
    calibrated_l0: float
    original: HeldOutFigures
    converted: HeldOutFigures
    def __init__(self, transcoder_id: _Optional[str] = ..., format: _Optional[_Union[TranscoderFormat, str]] = ..., artifact_uri: _Optional[str] = ..., digest: _Optional[str] = ..., files: _Optional[_Iterable[_Union[ExportedFile, _Mapping]]] = ..., activation: _Optional[_Union[_training_pb2.Activation, str]] = ..., thresholds: _Optional[str] = ..., wanted_l0: _Optional[float] = ..., calibrated_l0: _Optional[float] = ..., original: _Optional[_Union[HeldOutFigures, _Mapping]] = ..., converted: _Optional[_Union[HeldOutFigures, _Mapping]] = ...) -> None: ...

class ReadExportedFileRequest(_message.Message):
    __slots__ = ("digest", "name", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    offset: int
    length: int
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ImportTranscoderRequest(_message.Message):
    __slots__ = ("model_id", "format", "source", "identifier", "revision", "subfolder", "layer", "name", "request_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SUBFOLDER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    format: TranscoderFormat
    source: TranscoderSource
    identifier: str
    revision: str
    subfolder: str
    layer: int
    name: str
    request_id: str
    def __init__(self, model_id: _Optional[str] = ..., format: _Optional[_Union[TranscoderFormat, str]] = ..., source: _Optional[_Union[TranscoderSource, str]] = ..., identifier: _Optional[str] = ..., revision: _Optional[str] = ..., subfolder: _Optional[str] = ..., layer: _Optional[int] = ..., name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class TrainingCheckpoint(_message.Message):
    __slots__ = ("job_id", "checkpoint", "coder")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CODER_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    checkpoint: str
    coder: str
    def __init__(self, job_id: _Optional[str] = ..., checkpoint: _Optional[str] = ..., coder: _Optional[str] = ...) -> None: ...

class CompareTranscodersRequest(_message.Message):
    __slots__ = ("transcoder_ids", "dataset_id", "num_batches", "batch_size", "max_length", "mode", "request_id", "prefix", "checkpoints", "devices")
    TRANSCODER_IDS_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    transcoder_ids: _containers.RepeatedScalarFieldContainer[str]
    dataset_id: str
    num_batches: int
    batch_size: int
    max_length: int
    mode: _training_pb2.EvaluationMode
    request_id: str
    prefix: int
    checkpoints: _containers.RepeatedCompositeFieldContainer[TrainingCheckpoint]
    devices: int
    def __init__(self, transcoder_ids: _Optional[_Iterable[str]] = ..., dataset_id: _Optional[str] = ..., num_batches: _Optional[int] = ..., batch_size: _Optional[int] = ..., max_length: _Optional[int] = ..., mode: _Optional[_Union[_training_pb2.EvaluationMode, str]] = ..., request_id: _Optional[str] = ..., prefix: _Optional[int] = ..., checkpoints: _Optional[_Iterable[_Union[TrainingCheckpoint, _Mapping]]] = ..., devices: _Optional[int] = ...) -> None: ...

class ComparedTranscoder(_message.Message):
    __slots__ = ("transcoder_id", "evaluation_id", "job_id", "training_job_id", "checkpoint", "coder")
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINING_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CODER_FIELD_NUMBER: _ClassVar[int]
    transcoder_id: str
    evaluation_id: str
    job_id: str
    training_job_id: str
    checkpoint: str
    coder: str
    def __init__(self, transcoder_id: _Optional[str] = ..., evaluation_id: _Optional[str] = ..., job_id: _Optional[str] = ..., training_job_id: _Optional[str] = ..., checkpoint: _Optional[str] = ..., coder: _Optional[str] = ...) -> None: ...

class CompareTranscodersResponse(_message.Message):
    __slots__ = ("compared",)
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    compared: _containers.RepeatedCompositeFieldContainer[ComparedTranscoder]
    def __init__(self, compared: _Optional[_Iterable[_Union[ComparedTranscoder, _Mapping]]] = ...) -> None: ...

class GetEvaluationsRequest(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetEvaluationsResponse(_message.Message):
    __slots__ = ("evaluations",)
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[_training_pb2.Evaluation]
    def __init__(self, evaluations: _Optional[_Iterable[_Union[_training_pb2.Evaluation, _Mapping]]] = ...) -> None: ...

class GetFeatureRequest(_message.Message):
    __slots__ = ("id", "feature")
    ID_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    feature: int
    def __init__(self, id: _Optional[str] = ..., feature: _Optional[int] = ...) -> None: ...

class FeatureContext(_message.Message):
    __slots__ = ("tokens", "token_ids", "values", "peak")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PEAK_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    peak: int
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., values: _Optional[_Iterable[float]] = ..., peak: _Optional[int] = ...) -> None: ...

class LogitEffect(_message.Message):
    __slots__ = ("token_id", "token", "value")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: str
    value: float
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class NearbyFeature(_message.Message):
    __slots__ = ("feature", "cosine")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    feature: int
    cosine: float
    def __init__(self, feature: _Optional[int] = ..., cosine: _Optional[float] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("transcoder_id", "feature", "prefix", "density", "tokens", "contexts", "top_logits", "bottom_logits", "nearest")
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGITS_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_LOGITS_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    transcoder_id: str
    feature: int
    prefix: int
    density: float
    tokens: int
    contexts: _containers.RepeatedCompositeFieldContainer[FeatureContext]
    top_logits: _containers.RepeatedCompositeFieldContainer[LogitEffect]
    bottom_logits: _containers.RepeatedCompositeFieldContainer[LogitEffect]
    nearest: _containers.RepeatedCompositeFieldContainer[NearbyFeature]
    def __init__(self, transcoder_id: _Optional[str] = ..., feature: _Optional[int] = ..., prefix: _Optional[int] = ..., density: _Optional[float] = ..., tokens: _Optional[int] = ..., contexts: _Optional[_Iterable[_Union[FeatureContext, _Mapping]]] = ..., top_logits: _Optional[_Iterable[_Union[LogitEffect, _Mapping]]] = ..., bottom_logits: _Optional[_Iterable[_Union[LogitEffect, _Mapping]]] = ..., nearest: _Optional[_Iterable[_Union[NearbyFeature, _Mapping]]] = ...) -> None: ...

class GetTrainingPlotRequest(_message.Message):
    __slots__ = ("id", "plot")
    ID_FIELD_NUMBER: _ClassVar[int]
    PLOT_FIELD_NUMBER: _ClassVar[int]
    id: str
    plot: str
    def __init__(self, id: _Optional[str] = ..., plot: _Optional[str] = ...) -> None: ...

class GetTranscoderPlotRequest(_message.Message):
    __slots__ = ("id", "plot")
    ID_FIELD_NUMBER: _ClassVar[int]
    PLOT_FIELD_NUMBER: _ClassVar[int]
    id: str
    plot: str
    def __init__(self, id: _Optional[str] = ..., plot: _Optional[str] = ...) -> None: ...
