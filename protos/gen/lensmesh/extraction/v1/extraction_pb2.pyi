import datetime

from buf.validate import validate_pb2 as _validate_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.api import httpbody_pb2 as _httpbody_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from lensmesh.common.v1 import types_pb2 as _types_pb2
from lensmesh.http.v1 import http_pb2 as _http_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExtractionStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTRACTION_STATUS_UNSPECIFIED: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_QUEUED: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_EXTRACTING: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_COMPLETED: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_FAILED: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_CANCELLED: _ClassVar[ExtractionStatus]
    EXTRACTION_STATUS_PAUSED: _ClassVar[ExtractionStatus]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_ROWS: _ClassVar[Layout]
    LAYOUT_SEQUENCES: _ClassVar[Layout]

class SpecialTokens(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPECIAL_TOKENS_UNSPECIFIED: _ClassVar[SpecialTokens]
    SPECIAL_TOKENS_TOKENIZER: _ClassVar[SpecialTokens]
    SPECIAL_TOKENS_NONE: _ClassVar[SpecialTokens]
    SPECIAL_TOKENS_BOS: _ClassVar[SpecialTokens]

class ExtractionMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTRACTION_MODE_UNSPECIFIED: _ClassVar[ExtractionMode]
    EXTRACTION_MODE_FULL: _ClassVar[ExtractionMode]
    EXTRACTION_MODE_SAFE: _ClassVar[ExtractionMode]
    EXTRACTION_MODE_CPU: _ClassVar[ExtractionMode]
    EXTRACTION_MODE_AUTO: _ClassVar[ExtractionMode]

class IfUnloaded(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IF_UNLOADED_UNSPECIFIED: _ClassVar[IfUnloaded]
    IF_UNLOADED_LOAD: _ClassVar[IfUnloaded]
    IF_UNLOADED_WAIT: _ClassVar[IfUnloaded]
    IF_UNLOADED_FAIL: _ClassVar[IfUnloaded]

class CacheMatch(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_MATCH_UNSPECIFIED: _ClassVar[CacheMatch]
    CACHE_MATCH_HIT: _ClassVar[CacheMatch]
    CACHE_MATCH_SUBSET: _ClassVar[CacheMatch]
    CACHE_MATCH_MISS: _ClassVar[CacheMatch]
EXTRACTION_STATUS_UNSPECIFIED: ExtractionStatus
EXTRACTION_STATUS_QUEUED: ExtractionStatus
EXTRACTION_STATUS_EXTRACTING: ExtractionStatus
EXTRACTION_STATUS_COMPLETED: ExtractionStatus
EXTRACTION_STATUS_FAILED: ExtractionStatus
EXTRACTION_STATUS_CANCELLED: ExtractionStatus
EXTRACTION_STATUS_PAUSED: ExtractionStatus
LAYOUT_UNSPECIFIED: Layout
LAYOUT_ROWS: Layout
LAYOUT_SEQUENCES: Layout
SPECIAL_TOKENS_UNSPECIFIED: SpecialTokens
SPECIAL_TOKENS_TOKENIZER: SpecialTokens
SPECIAL_TOKENS_NONE: SpecialTokens
SPECIAL_TOKENS_BOS: SpecialTokens
EXTRACTION_MODE_UNSPECIFIED: ExtractionMode
EXTRACTION_MODE_FULL: ExtractionMode
EXTRACTION_MODE_SAFE: ExtractionMode
EXTRACTION_MODE_CPU: ExtractionMode
EXTRACTION_MODE_AUTO: ExtractionMode
IF_UNLOADED_UNSPECIFIED: IfUnloaded
IF_UNLOADED_LOAD: IfUnloaded
IF_UNLOADED_WAIT: IfUnloaded
IF_UNLOADED_FAIL: IfUnloaded
CACHE_MATCH_UNSPECIFIED: CacheMatch
CACHE_MATCH_HIT: CacheMatch
CACHE_MATCH_SUBSET: CacheMatch
CACHE_MATCH_MISS: CacheMatch

class ExtractActivationsRequest(_message.Message):
    __slots__ = ("model_id", "dataset_id", "layer_indices", "hook_points", "sites", "layout", "sample_count", "batch_size", "max_length", "dtype", "extension_id", "seed", "validate_only", "request_id", "max_tokens", "apply_rmsnorm_scaling", "special_tokens", "packing", "if_unloaded", "mode", "keep_order")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_INDICES_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    APPLY_RMSNORM_SCALING_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    IF_UNLOADED_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ORDER_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    dataset_id: str
    layer_indices: _containers.RepeatedScalarFieldContainer[int]
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    sites: _containers.RepeatedScalarFieldContainer[str]
    layout: Layout
    sample_count: int
    batch_size: int
    max_length: int
    dtype: _types_pb2.Dtype
    extension_id: str
    seed: int
    validate_only: bool
    request_id: str
    max_tokens: int
    apply_rmsnorm_scaling: bool
    special_tokens: SpecialTokens
    packing: bool
    if_unloaded: IfUnloaded
    mode: ExtractionMode
    keep_order: bool
    def __init__(self, model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., layer_indices: _Optional[_Iterable[int]] = ..., hook_points: _Optional[_Iterable[str]] = ..., sites: _Optional[_Iterable[str]] = ..., layout: _Optional[_Union[Layout, str]] = ..., sample_count: _Optional[int] = ..., batch_size: _Optional[int] = ..., max_length: _Optional[int] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., extension_id: _Optional[str] = ..., seed: _Optional[int] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ..., max_tokens: _Optional[int] = ..., apply_rmsnorm_scaling: _Optional[bool] = ..., special_tokens: _Optional[_Union[SpecialTokens, str]] = ..., packing: _Optional[bool] = ..., if_unloaded: _Optional[_Union[IfUnloaded, str]] = ..., mode: _Optional[_Union[ExtractionMode, str]] = ..., keep_order: _Optional[bool] = ...) -> None: ...

class ExtractActivationsResponse(_message.Message):
    __slots__ = ("extraction_id", "status", "estimated_time_seconds", "estimated_bytes", "cache", "fits_limit", "message")
    EXTRACTION_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    FITS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    extraction_id: str
    status: ExtractionStatus
    estimated_time_seconds: float
    estimated_bytes: int
    cache: CacheMatch
    fits_limit: bool
    message: str
    def __init__(self, extraction_id: _Optional[str] = ..., status: _Optional[_Union[ExtractionStatus, str]] = ..., estimated_time_seconds: _Optional[float] = ..., estimated_bytes: _Optional[int] = ..., cache: _Optional[_Union[CacheMatch, str]] = ..., fits_limit: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class Extraction(_message.Message):
    __slots__ = ("extraction_id", "model_id", "dataset_id", "status", "progress", "cache_id", "storage_uri", "file_size_bytes", "extraction_time_seconds", "samples_processed", "total_samples", "tokens", "activation_shape", "reused", "message", "hook_points", "error_code", "error_message", "waiting_for", "job_id", "created_by", "created_at", "finished_at", "tokens_per_second", "identity_error")
    EXTRACTION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    STORAGE_URI_FIELD_NUMBER: _ClassVar[int]
    FILE_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXTRACTION_TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PROCESSED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_SHAPE_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    extraction_id: str
    model_id: str
    dataset_id: str
    status: ExtractionStatus
    progress: float
    cache_id: str
    storage_uri: str
    file_size_bytes: int
    extraction_time_seconds: float
    samples_processed: int
    total_samples: int
    tokens: int
    activation_shape: _containers.RepeatedScalarFieldContainer[int]
    reused: bool
    message: str
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    error_code: str
    error_message: str
    waiting_for: str
    job_id: str
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    finished_at: _timestamp_pb2.Timestamp
    tokens_per_second: float
    identity_error: float
    def __init__(self, extraction_id: _Optional[str] = ..., model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., status: _Optional[_Union[ExtractionStatus, str]] = ..., progress: _Optional[float] = ..., cache_id: _Optional[str] = ..., storage_uri: _Optional[str] = ..., file_size_bytes: _Optional[int] = ..., extraction_time_seconds: _Optional[float] = ..., samples_processed: _Optional[int] = ..., total_samples: _Optional[int] = ..., tokens: _Optional[int] = ..., activation_shape: _Optional[_Iterable[int]] = ..., reused: _Optional[bool] = ..., message: _Optional[str] = ..., hook_points: _Optional[_Iterable[str]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., waiting_for: _Optional[str] = ..., job_id: _Optional[str] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tokens_per_second: _Optional[float] = ..., identity_error: _Optional[float] = ...) -> None: ...

class GetModelExtractionRequest(_message.Message):
    __slots__ = ("model_id", "extraction_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EXTRACTION_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    extraction_id: str
    def __init__(self, model_id: _Optional[str] = ..., extraction_id: _Optional[str] = ...) -> None: ...

class GetExtractionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListExtractionsRequest(_message.Message):
    __slots__ = ("model_id", "status", "limit", "offset", "page_token", "read_mask")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    status: ExtractionStatus
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, model_id: _Optional[str] = ..., status: _Optional[_Union[ExtractionStatus, str]] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListExtractionsResponse(_message.Message):
    __slots__ = ("extractions", "total", "limit", "offset", "next_page_token")
    EXTRACTIONS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    extractions: _containers.RepeatedCompositeFieldContainer[Extraction]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, extractions: _Optional[_Iterable[_Union[Extraction, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelExtractionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class PauseExtractionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ResumeExtractionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteExtractionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("index", "rows", "size_bytes", "digest")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    index: int
    rows: int
    size_bytes: int
    digest: str
    def __init__(self, index: _Optional[int] = ..., rows: _Optional[int] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class HookPointStatistics(_message.Message):
    __slots__ = ("hook_point", "width", "mean_norm", "variance")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MEAN_NORM_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIELD_NUMBER: _ClassVar[int]
    hook_point: str
    width: int
    mean_norm: float
    variance: float
    def __init__(self, hook_point: _Optional[str] = ..., width: _Optional[int] = ..., mean_norm: _Optional[float] = ..., variance: _Optional[float] = ...) -> None: ...

class ActivationCache(_message.Message):
    __slots__ = ("id", "model_id", "dataset_id", "hook_points", "layout", "dtype", "tokens", "samples", "max_length", "size_bytes", "storage_uri", "model_digest", "revision", "quantization", "extension_id", "shards", "statistics", "created_at", "last_accessed_at", "rows_read", "bad_rows", "truncated_rows", "truncated_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_URI_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_ACCESSED_AT_FIELD_NUMBER: _ClassVar[int]
    ROWS_READ_FIELD_NUMBER: _ClassVar[int]
    BAD_ROWS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_ROWS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model_id: str
    dataset_id: str
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    layout: Layout
    dtype: _types_pb2.Dtype
    tokens: int
    samples: int
    max_length: int
    size_bytes: int
    storage_uri: str
    model_digest: str
    revision: str
    quantization: _types_pb2.Quantization
    extension_id: str
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    statistics: _containers.RepeatedCompositeFieldContainer[HookPointStatistics]
    created_at: _timestamp_pb2.Timestamp
    last_accessed_at: _timestamp_pb2.Timestamp
    rows_read: int
    bad_rows: int
    truncated_rows: int
    truncated_tokens: int
    def __init__(self, id: _Optional[str] = ..., model_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., hook_points: _Optional[_Iterable[str]] = ..., layout: _Optional[_Union[Layout, str]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., tokens: _Optional[int] = ..., samples: _Optional[int] = ..., max_length: _Optional[int] = ..., size_bytes: _Optional[int] = ..., storage_uri: _Optional[str] = ..., model_digest: _Optional[str] = ..., revision: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., extension_id: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., statistics: _Optional[_Iterable[_Union[HookPointStatistics, _Mapping]]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_accessed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rows_read: _Optional[int] = ..., bad_rows: _Optional[int] = ..., truncated_rows: _Optional[int] = ..., truncated_tokens: _Optional[int] = ...) -> None: ...

class GetActivationCacheRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListActivationCachesRequest(_message.Message):
    __slots__ = ("model_id", "limit", "offset", "page_token", "read_mask")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, model_id: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListActivationCachesResponse(_message.Message):
    __slots__ = ("activation_caches", "total", "limit", "offset", "next_page_token")
    ACTIVATION_CACHES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    activation_caches: _containers.RepeatedCompositeFieldContainer[ActivationCache]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, activation_caches: _Optional[_Iterable[_Union[ActivationCache, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteActivationCacheRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class VerifyActivationCacheRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class VerifyActivationCacheResponse(_message.Message):
    __slots__ = ("id", "ok", "problems")
    ID_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    id: str
    ok: bool
    problems: _containers.RepeatedCompositeFieldContainer[ShardProblem]
    def __init__(self, id: _Optional[str] = ..., ok: _Optional[bool] = ..., problems: _Optional[_Iterable[_Union[ShardProblem, _Mapping]]] = ...) -> None: ...

class ShardProblem(_message.Message):
    __slots__ = ("index", "problem", "file")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    index: int
    problem: str
    file: str
    def __init__(self, index: _Optional[int] = ..., problem: _Optional[str] = ..., file: _Optional[str] = ...) -> None: ...

class ReadShardRequest(_message.Message):
    __slots__ = ("id", "index", "offset", "length")
    ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    id: str
    index: int
    offset: int
    length: int
    def __init__(self, id: _Optional[str] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadCacheFileRequest(_message.Message):
    __slots__ = ("id", "name", "offset", "length")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    offset: int
    length: int
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadUnitRequest(_message.Message):
    __slots__ = ("extraction_id", "unit", "fence", "sums", "offset")
    EXTRACTION_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    extraction_id: str
    unit: int
    fence: int
    sums: bool
    offset: int
    def __init__(self, extraction_id: _Optional[str] = ..., unit: _Optional[int] = ..., fence: _Optional[int] = ..., sums: _Optional[bool] = ..., offset: _Optional[int] = ...) -> None: ...

class OpenCacheRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class OpenedCache(_message.Message):
    __slots__ = ("cache", "widths")
    CACHE_FIELD_NUMBER: _ClassVar[int]
    WIDTHS_FIELD_NUMBER: _ClassVar[int]
    cache: ActivationCache
    widths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, cache: _Optional[_Union[ActivationCache, _Mapping]] = ..., widths: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamActivationsRequest(_message.Message):
    __slots__ = ("extraction", "cursor", "offset", "rows", "buffer_bytes", "place")
    EXTRACTION_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    extraction: ExtractActivationsRequest
    cursor: int
    offset: int
    rows: int
    buffer_bytes: int
    place: str
    def __init__(self, extraction: _Optional[_Union[ExtractActivationsRequest, _Mapping]] = ..., cursor: _Optional[int] = ..., offset: _Optional[int] = ..., rows: _Optional[int] = ..., buffer_bytes: _Optional[int] = ..., place: _Optional[str] = ...) -> None: ...

class StreamedActivations(_message.Message):
    __slots__ = ("hook_points", "widths", "dtype", "rows_per_pass", "by_handle", "model_digest", "identity_error")
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    WIDTHS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_PASS_FIELD_NUMBER: _ClassVar[int]
    BY_HANDLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    widths: _containers.RepeatedScalarFieldContainer[int]
    dtype: _types_pb2.Dtype
    rows_per_pass: int
    by_handle: bool
    model_digest: str
    identity_error: float
    def __init__(self, hook_points: _Optional[_Iterable[str]] = ..., widths: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., rows_per_pass: _Optional[int] = ..., by_handle: _Optional[bool] = ..., model_digest: _Optional[str] = ..., identity_error: _Optional[float] = ...) -> None: ...

class ActivationBlock(_message.Message):
    __slots__ = ("first_row", "rows", "size_bytes", "handle", "offset", "chunk")
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    rows: int
    size_bytes: int
    handle: str
    offset: int
    chunk: bytes
    def __init__(self, first_row: _Optional[int] = ..., rows: _Optional[int] = ..., size_bytes: _Optional[int] = ..., handle: _Optional[str] = ..., offset: _Optional[int] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class StreamActivationsResponse(_message.Message):
    __slots__ = ("facts", "block")
    FACTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    facts: StreamedActivations
    block: ActivationBlock
    def __init__(self, facts: _Optional[_Union[StreamedActivations, _Mapping]] = ..., block: _Optional[_Union[ActivationBlock, _Mapping]] = ...) -> None: ...
