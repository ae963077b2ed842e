import datetime

from buf.validate import validate_pb2 as _validate_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
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

class TrainingStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINING_STATUS_UNSPECIFIED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_QUEUED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_RUNNING: _ClassVar[TrainingStatus]
    TRAINING_STATUS_PAUSED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_COMPLETED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_FAILED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_CANCELLED: _ClassVar[TrainingStatus]
    TRAINING_STATUS_FINALIZING: _ClassVar[TrainingStatus]

class Activation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVATION_UNSPECIFIED: _ClassVar[Activation]
    ACTIVATION_TOPK: _ClassVar[Activation]
    ACTIVATION_BATCH_TOPK: _ClassVar[Activation]
    ACTIVATION_JUMPRELU: _ClassVar[Activation]

class LrSchedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LR_SCHEDULE_UNSPECIFIED: _ClassVar[LrSchedule]
    LR_SCHEDULE_CONSTANT: _ClassVar[LrSchedule]
    LR_SCHEDULE_LINEAR: _ClassVar[LrSchedule]
    LR_SCHEDULE_COSINE: _ClassVar[LrSchedule]

class EvaluationMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVALUATION_MODE_UNSPECIFIED: _ClassVar[EvaluationMode]
    EVALUATION_MODE_FULL: _ClassVar[EvaluationMode]
    EVALUATION_MODE_SAFE: _ClassVar[EvaluationMode]
    EVALUATION_MODE_CPU: _ClassVar[EvaluationMode]
    EVALUATION_MODE_AUTO: _ClassVar[EvaluationMode]
TRAINING_STATUS_UNSPECIFIED: TrainingStatus
TRAINING_STATUS_QUEUED: TrainingStatus
TRAINING_STATUS_RUNNING: TrainingStatus
TRAINING_STATUS_PAUSED: TrainingStatus
TRAINING_STATUS_COMPLETED: TrainingStatus
TRAINING_STATUS_FAILED: TrainingStatus
TRAINING_STATUS_CANCELLED: TrainingStatus
TRAINING_STATUS_FINALIZING: TrainingStatus
ACTIVATION_UNSPECIFIED: Activation
ACTIVATION_TOPK: Activation
ACTIVATION_BATCH_TOPK: Activation
ACTIVATION_JUMPRELU: Activation
LR_SCHEDULE_UNSPECIFIED: LrSchedule
LR_SCHEDULE_CONSTANT: LrSchedule
LR_SCHEDULE_LINEAR: LrSchedule
LR_SCHEDULE_COSINE: LrSchedule
EVALUATION_MODE_UNSPECIFIED: EvaluationMode
EVALUATION_MODE_FULL: EvaluationMode
EVALUATION_MODE_SAFE: EvaluationMode
EVALUATION_MODE_CPU: EvaluationMode
EVALUATION_MODE_AUTO: EvaluationMode

class TrainingSource(_message.Message):
    __slots__ = ("cache_id", "dataset_id", "live", "split")
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    cache_id: str
    dataset_id: str
    live: bool
    split: bool
    def __init__(self, cache_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., live: _Optional[bool] = ..., split: _Optional[bool] = ...) -> None: ...

class TrainingConfig(_message.Message):
    __slots__ = ("source_site", "apply_rmsnorm_scaling", "target_site", "dict_size", "group_sizes", "prefix_widths", "top_k", "activation", "skip", "aux_k", "batch_size", "num_tokens", "learning_rate", "lr_schedule", "dtype", "seed", "prefix_weights", "unit_norm_decoder", "legacy")
    SOURCE_SITE_FIELD_NUMBER: _ClassVar[int]
    APPLY_RMSNORM_SCALING_FIELD_NUMBER: _ClassVar[int]
    TARGET_SITE_FIELD_NUMBER: _ClassVar[int]
    DICT_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WIDTHS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    AUX_K_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_NORM_DECODER_FIELD_NUMBER: _ClassVar[int]
    LEGACY_FIELD_NUMBER: _ClassVar[int]
    source_site: str
    apply_rmsnorm_scaling: bool
    target_site: str
    dict_size: int
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    prefix_widths: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    activation: Activation
    skip: bool
    aux_k: int
    batch_size: int
    num_tokens: int
    learning_rate: float
    lr_schedule: LrSchedule
    dtype: _types_pb2.Dtype
    seed: int
    prefix_weights: _containers.RepeatedScalarFieldContainer[float]
    unit_norm_decoder: bool
    legacy: bool
    def __init__(self, source_site: _Optional[str] = ..., apply_rmsnorm_scaling: _Optional[bool] = ..., target_site: _Optional[str] = ..., dict_size: _Optional[int] = ..., group_sizes: _Optional[_Iterable[int]] = ..., prefix_widths: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., activation: _Optional[_Union[Activation, str]] = ..., skip: _Optional[bool] = ..., aux_k: _Optional[int] = ..., batch_size: _Optional[int] = ..., num_tokens: _Optional[int] = ..., learning_rate: _Optional[float] = ..., lr_schedule: _Optional[_Union[LrSchedule, str]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., seed: _Optional[int] = ..., prefix_weights: _Optional[_Iterable[float]] = ..., unit_norm_decoder: _Optional[bool] = ..., legacy: _Optional[bool] = ...) -> None: ...

class CheckpointRetention(_message.Message):
    __slots__ = ("last", "best", "every_tokens")
    LAST_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    EVERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    last: int
    best: int
    every_tokens: int
    def __init__(self, last: _Optional[int] = ..., best: _Optional[int] = ..., every_tokens: _Optional[int] = ...) -> None: ...

class CreateTrainingJobRequest(_message.Message):
    __slots__ = ("model_id", "layers", "source", "source_site", "apply_rmsnorm_scaling", "target_site", "dict_size", "group_sizes", "prefix_widths", "top_k", "activation", "skip", "aux_k", "batch_size", "num_tokens", "learning_rate", "lr_schedule", "dtype", "seed", "variants", "devices", "tracker", "request_id", "validate_only", "prefix_weights", "unit_norm_decoder", "retention")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SITE_FIELD_NUMBER: _ClassVar[int]
    APPLY_RMSNORM_SCALING_FIELD_NUMBER: _ClassVar[int]
    TARGET_SITE_FIELD_NUMBER: _ClassVar[int]
    DICT_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WIDTHS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    AUX_K_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    TRACKER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_NORM_DECODER_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    source: TrainingSource
    source_site: str
    apply_rmsnorm_scaling: bool
    target_site: str
    dict_size: int
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    prefix_widths: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    activation: Activation
    skip: bool
    aux_k: int
    batch_size: int
    num_tokens: int
    learning_rate: float
    lr_schedule: LrSchedule
    dtype: _types_pb2.Dtype
    seed: int
    variants: _containers.RepeatedCompositeFieldContainer[TrainingConfig]
    devices: int
    tracker: str
    request_id: str
    validate_only: bool
    prefix_weights: _containers.RepeatedScalarFieldContainer[float]
    unit_norm_decoder: bool
    retention: CheckpointRetention
    def __init__(self, model_id: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., source: _Optional[_Union[TrainingSource, _Mapping]] = ..., source_site: _Optional[str] = ..., apply_rmsnorm_scaling: _Optional[bool] = ..., target_site: _Optional[str] = ..., dict_size: _Optional[int] = ..., group_sizes: _Optional[_Iterable[int]] = ..., prefix_widths: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., activation: _Optional[_Union[Activation, str]] = ..., skip: _Optional[bool] = ..., aux_k: _Optional[int] = ..., batch_size: _Optional[int] = ..., num_tokens: _Optional[int] = ..., learning_rate: _Optional[float] = ..., lr_schedule: _Optional[_Union[LrSchedule, str]] = ..., dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., seed: _Optional[int] = ..., variants: _Optional[_Iterable[_Union[TrainingConfig, _Mapping]]] = ..., devices: _Optional[int] = ..., tracker: _Optional[str] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ..., prefix_weights: _Optional[_Iterable[float]] = ..., unit_norm_decoder: _Optional[bool] = ..., retention: _Optional[_Union[CheckpointRetention, _Mapping]] = ...) -> None: ...

class CoderProgress(_message.Message):
    __slots__ = ("layer", "loss", "l2_loss", "aux_loss", "fvu", "fvu_per_prefix", "l0", "dead_fraction", "name", "l0_per_prefix", "gradient_norm", "fvu_min", "fvu_max", "fvu_mean", "seconds", "share", "tokens_per_second")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    L2_LOSS_FIELD_NUMBER: _ClassVar[int]
    AUX_LOSS_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    FVU_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    DEAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    L0_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    FVU_MIN_FIELD_NUMBER: _ClassVar[int]
    FVU_MAX_FIELD_NUMBER: _ClassVar[int]
    FVU_MEAN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    layer: int
    loss: float
    l2_loss: float
    aux_loss: float
    fvu: float
    fvu_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    l0: float
    dead_fraction: float
    name: str
    l0_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    gradient_norm: float
    fvu_min: float
    fvu_max: float
    fvu_mean: float
    seconds: float
    share: float
    tokens_per_second: float
    def __init__(self, layer: _Optional[int] = ..., loss: _Optional[float] = ..., l2_loss: _Optional[float] = ..., aux_loss: _Optional[float] = ..., fvu: _Optional[float] = ..., fvu_per_prefix: _Optional[_Iterable[float]] = ..., l0: _Optional[float] = ..., dead_fraction: _Optional[float] = ..., name: _Optional[str] = ..., l0_per_prefix: _Optional[_Iterable[float]] = ..., gradient_norm: _Optional[float] = ..., fvu_min: _Optional[float] = ..., fvu_max: _Optional[float] = ..., fvu_mean: _Optional[float] = ..., seconds: _Optional[float] = ..., share: _Optional[float] = ..., tokens_per_second: _Optional[float] = ...) -> None: ...

class TrainingJob(_message.Message):
    __slots__ = ("id", "model_id", "layers", "status", "progress", "config", "cache_id", "step", "tokens_seen", "num_tokens", "tokens_per_second", "loss", "l2_loss", "aux_loss", "fvu", "fvu_min", "fvu_max", "fvu_mean", "fvu_per_prefix", "l0", "dead_fraction", "learning_rate", "eta_seconds", "coders", "transcoder_ids", "error_code", "error_message", "waiting_for", "checkpoints", "created_by", "created_at", "finished_at", "estimated_memory_bytes", "coder_tokens_per_second", "gradient_norm", "l0_per_prefix", "variants", "devices", "threads", "retention", "live", "split")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SEEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    L2_LOSS_FIELD_NUMBER: _ClassVar[int]
    AUX_LOSS_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    FVU_MIN_FIELD_NUMBER: _ClassVar[int]
    FVU_MAX_FIELD_NUMBER: _ClassVar[int]
    FVU_MEAN_FIELD_NUMBER: _ClassVar[int]
    FVU_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    DEAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CODERS_FIELD_NUMBER: _ClassVar[int]
    TRANSCODER_IDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODER_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    L0_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    model_id: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    status: TrainingStatus
    progress: float
    config: TrainingConfig
    cache_id: str
    step: int
    tokens_seen: int
    num_tokens: int
    tokens_per_second: float
    loss: float
    l2_loss: float
    aux_loss: float
    fvu: float
    fvu_min: float
    fvu_max: float
    fvu_mean: float
    fvu_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    l0: float
    dead_fraction: float
    learning_rate: float
    eta_seconds: float
    coders: _containers.RepeatedCompositeFieldContainer[CoderProgress]
    transcoder_ids: _containers.RepeatedScalarFieldContainer[str]
    error_code: str
    error_message: str
    waiting_for: str
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    finished_at: _timestamp_pb2.Timestamp
    estimated_memory_bytes: int
    coder_tokens_per_second: float
    gradient_norm: float
    l0_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    variants: _containers.RepeatedCompositeFieldContainer[TrainingConfig]
    devices: int
    threads: int
    retention: CheckpointRetention
    live: bool
    split: bool
    def __init__(self, id: _Optional[str] = ..., model_id: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., status: _Optional[_Union[TrainingStatus, str]] = ..., progress: _Optional[float] = ..., config: _Optional[_Union[TrainingConfig, _Mapping]] = ..., cache_id: _Optional[str] = ..., step: _Optional[int] = ..., tokens_seen: _Optional[int] = ..., num_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., loss: _Optional[float] = ..., l2_loss: _Optional[float] = ..., aux_loss: _Optional[float] = ..., fvu: _Optional[float] = ..., fvu_min: _Optional[float] = ..., fvu_max: _Optional[float] = ..., fvu_mean: _Optional[float] = ..., fvu_per_prefix: _Optional[_Iterable[float]] = ..., l0: _Optional[float] = ..., dead_fraction: _Optional[float] = ..., learning_rate: _Optional[float] = ..., eta_seconds: _Optional[float] = ..., coders: _Optional[_Iterable[_Union[CoderProgress, _Mapping]]] = ..., transcoder_ids: _Optional[_Iterable[str]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., waiting_for: _Optional[str] = ..., checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., estimated_memory_bytes: _Optional[int] = ..., coder_tokens_per_second: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., l0_per_prefix: _Optional[_Iterable[float]] = ..., variants: _Optional[_Iterable[_Union[TrainingConfig, _Mapping]]] = ..., devices: _Optional[int] = ..., threads: _Optional[int] = ..., retention: _Optional[_Union[CheckpointRetention, _Mapping]] = ..., live: _Optional[bool] = ..., split: _Optional[bool] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("id", "step", "tokens_seen", "fvu", "size_bytes", "created_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SEEN_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    step: int
    tokens_seen: int
    fvu: float
    size_bytes: int
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., step: _Optional[int] = ..., tokens_seen: _Optional[int] = ..., fvu: _Optional[float] = ..., size_bytes: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetTrainingJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListTrainingJobsRequest(_message.Message):
    __slots__ = ("model_id", "status", "limit", "offset", "page_token", "read_mask")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    status: TrainingStatus
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, model_id: _Optional[str] = ..., status: _Optional[_Union[TrainingStatus, str]] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListTrainingJobsResponse(_message.Message):
    __slots__ = ("training_jobs", "total", "limit", "offset", "next_page_token")
    TRAINING_JOBS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    training_jobs: _containers.RepeatedCompositeFieldContainer[TrainingJob]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, training_jobs: _Optional[_Iterable[_Union[TrainingJob, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetTrainingMetricsRequest(_message.Message):
    __slots__ = ("id", "points")
    ID_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    points: int
    def __init__(self, id: _Optional[str] = ..., points: _Optional[int] = ...) -> None: ...

class TrainingMetrics(_message.Message):
    __slots__ = ("id", "points")
    ID_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    points: _containers.RepeatedCompositeFieldContainer[TrainingPoint]
    def __init__(self, id: _Optional[str] = ..., points: _Optional[_Iterable[_Union[TrainingPoint, _Mapping]]] = ...) -> None: ...

class TrainingPoint(_message.Message):
    __slots__ = ("step", "tokens_seen", "learning_rate", "tokens_per_second", "coders", "coder_tokens_per_second")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SEEN_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CODERS_FIELD_NUMBER: _ClassVar[int]
    CODER_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens_seen: int
    learning_rate: float
    tokens_per_second: float
    coders: _containers.RepeatedCompositeFieldContainer[CoderProgress]
    coder_tokens_per_second: float
    def __init__(self, step: _Optional[int] = ..., tokens_seen: _Optional[int] = ..., learning_rate: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., coders: _Optional[_Iterable[_Union[CoderProgress, _Mapping]]] = ..., coder_tokens_per_second: _Optional[float] = ...) -> None: ...

class CancelTrainingJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class PauseTrainingJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ResumeTrainingJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class FinalizeTrainingJobRequest(_message.Message):
    __slots__ = ("id", "checkpoint")
    ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    id: str
    checkpoint: str
    def __init__(self, id: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class PruneCheckpointsRequest(_message.Message):
    __slots__ = ("id", "retention", "validate_only")
    ID_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    id: str
    retention: CheckpointRetention
    validate_only: bool
    def __init__(self, id: _Optional[str] = ..., retention: _Optional[_Union[CheckpointRetention, _Mapping]] = ..., validate_only: _Optional[bool] = ...) -> None: ...

class PruneCheckpointsResponse(_message.Message):
    __slots__ = ("kept", "deleted", "freed_bytes")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    kept: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    deleted: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    freed_bytes: int
    def __init__(self, kept: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., deleted: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class GetTrainingConfigRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CloneTrainingJobRequest(_message.Message):
    __slots__ = ("id", "request_id", "validate_only")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    validate_only: bool
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ...) -> None: ...

class Transcoder(_message.Message):
    __slots__ = ("id", "name", "model_id", "layer", "source_hook_point", "target_hook_point", "job_id", "d_in", "d_out", "dict_size", "group_sizes", "prefix_widths", "top_k", "activation", "artifact_uri", "size_bytes", "base_digest", "tokens_seen", "train_fvu", "created_by", "created_at", "legacy_source")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    TARGET_HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    DICT_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WIDTHS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SEEN_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FVU_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LEGACY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    model_id: str
    layer: int
    source_hook_point: str
    target_hook_point: str
    job_id: str
    d_in: int
    d_out: int
    dict_size: int
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    prefix_widths: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    activation: Activation
    artifact_uri: str
    size_bytes: int
    base_digest: str
    tokens_seen: int
    train_fvu: float
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    legacy_source: bool
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., model_id: _Optional[str] = ..., layer: _Optional[int] = ..., source_hook_point: _Optional[str] = ..., target_hook_point: _Optional[str] = ..., job_id: _Optional[str] = ..., d_in: _Optional[int] = ..., d_out: _Optional[int] = ..., dict_size: _Optional[int] = ..., group_sizes: _Optional[_Iterable[int]] = ..., prefix_widths: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., activation: _Optional[_Union[Activation, str]] = ..., artifact_uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., base_digest: _Optional[str] = ..., tokens_seen: _Optional[int] = ..., train_fvu: _Optional[float] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., legacy_source: _Optional[bool] = ...) -> None: ...

class GetTranscoderRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListTranscodersRequest(_message.Message):
    __slots__ = ("model_id", "layer", "limit", "offset", "page_token", "read_mask")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    layer: int
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, model_id: _Optional[str] = ..., layer: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListTranscodersResponse(_message.Message):
    __slots__ = ("transcoders", "total", "limit", "offset", "next_page_token")
    TRANSCODERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    transcoders: _containers.RepeatedCompositeFieldContainer[Transcoder]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, transcoders: _Optional[_Iterable[_Union[Transcoder, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteTranscoderRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class EvaluateTranscoderRequest(_message.Message):
    __slots__ = ("id", "dataset_id", "num_batches", "batch_size", "max_length", "mode", "prefix", "request_id", "samples_per_feature", "devices")
    ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_FEATURE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    id: str
    dataset_id: str
    num_batches: int
    batch_size: int
    max_length: int
    mode: EvaluationMode
    prefix: int
    request_id: str
    samples_per_feature: int
    devices: int
    def __init__(self, id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., num_batches: _Optional[int] = ..., batch_size: _Optional[int] = ..., max_length: _Optional[int] = ..., mode: _Optional[_Union[EvaluationMode, str]] = ..., prefix: _Optional[int] = ..., request_id: _Optional[str] = ..., samples_per_feature: _Optional[int] = ..., devices: _Optional[int] = ...) -> None: ...

class QueuedJob(_message.Message):
    __slots__ = ("job_id", "resource_id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    resource_id: str
    def __init__(self, job_id: _Optional[str] = ..., resource_id: _Optional[str] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("id", "transcoder_id", "dataset_id", "job_id", "fvu", "fvu_per_prefix", "fvu_min", "fvu_max", "fvu_mean", "fvu_standard_error", "l0", "l0_per_prefix", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "ce_recovered", "ce_standard_error", "kl", "tokens", "batches", "mode", "prefix", "seconds", "density_histogram", "created_at", "training_job_id", "checkpoint", "coder")
    ID_FIELD_NUMBER: _ClassVar[int]
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    FVU_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    FVU_MIN_FIELD_NUMBER: _ClassVar[int]
    FVU_MAX_FIELD_NUMBER: _ClassVar[int]
    FVU_MEAN_FIELD_NUMBER: _ClassVar[int]
    FVU_STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    L0_PER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DEAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    CE_CLEAN_FIELD_NUMBER: _ClassVar[int]
    CE_SPLICED_FIELD_NUMBER: _ClassVar[int]
    CE_ZERO_ABLATED_FIELD_NUMBER: _ClassVar[int]
    CE_MEAN_ABLATED_FIELD_NUMBER: _ClassVar[int]
    CE_RECOVERED_FIELD_NUMBER: _ClassVar[int]
    CE_STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CODER_FIELD_NUMBER: _ClassVar[int]
    id: str
    transcoder_id: str
    dataset_id: str
    job_id: str
    fvu: float
    fvu_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    fvu_min: float
    fvu_max: float
    fvu_mean: float
    fvu_standard_error: float
    l0: float
    l0_per_prefix: _containers.RepeatedScalarFieldContainer[float]
    dead_fraction: float
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    ce_recovered: float
    ce_standard_error: float
    kl: float
    tokens: int
    batches: int
    mode: EvaluationMode
    prefix: int
    seconds: float
    density_histogram: _containers.RepeatedScalarFieldContainer[int]
    created_at: _timestamp_pb2.Timestamp
    training_job_id: str
    checkpoint: str
    coder: str
    def __init__(self, id: _Optional[str] = ..., transcoder_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., job_id: _Optional[str] = ..., fvu: _Optional[float] = ..., fvu_per_prefix: _Optional[_Iterable[float]] = ..., fvu_min: _Optional[float] = ..., fvu_max: _Optional[float] = ..., fvu_mean: _Optional[float] = ..., fvu_standard_error: _Optional[float] = ..., l0: _Optional[float] = ..., l0_per_prefix: _Optional[_Iterable[float]] = ..., dead_fraction: _Optional[float] = ..., ce_clean: _Optional[float] = ..., ce_spliced: _Optional[float] = ..., ce_zero_ablated: _Optional[float] = ..., ce_mean_ablated: _Optional[float] = ..., ce_recovered: _Optional[float] = ..., ce_standard_error: _Optional[float] = ..., kl: _Optional[float] = ..., tokens: _Optional[int] = ..., batches: _Optional[int] = ..., mode: _Optional[_Union[EvaluationMode, str]] = ..., prefix: _Optional[int] = ..., seconds: _Optional[float] = ..., density_histogram: _Optional[_Iterable[int]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., training_job_id: _Optional[str] = ..., checkpoint: _Optional[str] = ..., coder: _Optional[str] = ...) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ("id", "limit", "offset", "page_token", "read_mask")
    ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    id: str
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, id: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListEvaluationsResponse(_message.Message):
    __slots__ = ("evaluations", "total", "limit", "offset", "next_page_token")
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class EncodeTextRequest(_message.Message):
    __slots__ = ("id", "text", "token_ids", "top_k", "prefix")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    prefix: int
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., prefix: _Optional[int] = ...) -> None: ...
