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

class ExtensionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTENSION_KIND_UNSPECIFIED: _ClassVar[ExtensionKind]
    EXTENSION_KIND_LORA: _ClassVar[ExtensionKind]
    EXTENSION_KIND_LAYER: _ClassVar[ExtensionKind]
    EXTENSION_KIND_HYBRID: _ClassVar[ExtensionKind]

class LoraVariant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LORA_VARIANT_UNSPECIFIED: _ClassVar[LoraVariant]
    LORA_VARIANT_LORA: _ClassVar[LoraVariant]
    LORA_VARIANT_RSLORA: _ClassVar[LoraVariant]
    LORA_VARIANT_DORA: _ClassVar[LoraVariant]
    LORA_VARIANT_ADALORA: _ClassVar[LoraVariant]

class LayerPosition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_POSITION_UNSPECIFIED: _ClassVar[LayerPosition]
    LAYER_POSITION_ENCODER: _ClassVar[LayerPosition]
    LAYER_POSITION_DECODER: _ClassVar[LayerPosition]
    LAYER_POSITION_BOTH: _ClassVar[LayerPosition]

class LearningRateSchedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEARNING_RATE_SCHEDULE_UNSPECIFIED: _ClassVar[LearningRateSchedule]
    LEARNING_RATE_SCHEDULE_COSINE: _ClassVar[LearningRateSchedule]
    LEARNING_RATE_SCHEDULE_LINEAR: _ClassVar[LearningRateSchedule]
    LEARNING_RATE_SCHEDULE_CONSTANT: _ClassVar[LearningRateSchedule]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FP32: _ClassVar[Precision]
    PRECISION_BF16: _ClassVar[Precision]
    PRECISION_FP16: _ClassVar[Precision]

class ExtensionStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTENSION_STATUS_UNSPECIFIED: _ClassVar[ExtensionStatus]
    EXTENSION_STATUS_CREATED: _ClassVar[ExtensionStatus]
    EXTENSION_STATUS_TRAINING: _ClassVar[ExtensionStatus]
    EXTENSION_STATUS_TRAINED: _ClassVar[ExtensionStatus]
    EXTENSION_STATUS_FAILED: _ClassVar[ExtensionStatus]
EXTENSION_KIND_UNSPECIFIED: ExtensionKind
EXTENSION_KIND_LORA: ExtensionKind
EXTENSION_KIND_LAYER: ExtensionKind
EXTENSION_KIND_HYBRID: ExtensionKind
LORA_VARIANT_UNSPECIFIED: LoraVariant
LORA_VARIANT_LORA: LoraVariant
LORA_VARIANT_RSLORA: LoraVariant
LORA_VARIANT_DORA: LoraVariant
LORA_VARIANT_ADALORA: LoraVariant
LAYER_POSITION_UNSPECIFIED: LayerPosition
LAYER_POSITION_ENCODER: LayerPosition
LAYER_POSITION_DECODER: LayerPosition
LAYER_POSITION_BOTH: LayerPosition
LEARNING_RATE_SCHEDULE_UNSPECIFIED: LearningRateSchedule
LEARNING_RATE_SCHEDULE_COSINE: LearningRateSchedule
LEARNING_RATE_SCHEDULE_LINEAR: LearningRateSchedule
LEARNING_RATE_SCHEDULE_CONSTANT: LearningRateSchedule
PRECISION_UNSPECIFIED: Precision
PRECISION_FP32: Precision
PRECISION_BF16: Precision
PRECISION_FP16: Precision
EXTENSION_STATUS_UNSPECIFIED: ExtensionStatus
EXTENSION_STATUS_CREATED: ExtensionStatus
EXTENSION_STATUS_TRAINING: ExtensionStatus
EXTENSION_STATUS_TRAINED: ExtensionStatus
EXTENSION_STATUS_FAILED: ExtensionStatus

class LoraConfig(_message.Message):
    __slots__ = ("r", "alpha", "dropout", "target_modules", "variant", "target_r")
    R_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    TARGET_R_FIELD_NUMBER: _ClassVar[int]
    r: int
    alpha: float
    dropout: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    variant: LoraVariant
    target_r: int
    def __init__(self, r: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., variant: _Optional[_Union[LoraVariant, str]] = ..., target_r: _Optional[int] = ...) -> None: ...

class LayerConfig(_message.Message):
    __slots__ = ("position", "index", "initialization_scale", "mlp_width", "from_step")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    INITIALIZATION_SCALE_FIELD_NUMBER: _ClassVar[int]
    MLP_WIDTH_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    position: LayerPosition
    index: int
    initialization_scale: float
    mlp_width: int
    from_step: int
    def __init__(self, position: _Optional[_Union[LayerPosition, str]] = ..., index: _Optional[int] = ..., initialization_scale: _Optional[float] = ..., mlp_width: _Optional[int] = ..., from_step: _Optional[int] = ...) -> None: ...

class ParameterCounts(_message.Message):
    __slots__ = ("base", "trainable", "lora", "layer", "trainable_over_base", "trainable_over_total", "shared")
    BASE_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_OVER_BASE_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_OVER_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    base: int
    trainable: int
    lora: int
    layer: int
    trainable_over_base: float
    trainable_over_total: float
    shared: int
    def __init__(self, base: _Optional[int] = ..., trainable: _Optional[int] = ..., lora: _Optional[int] = ..., layer: _Optional[int] = ..., trainable_over_base: _Optional[float] = ..., trainable_over_total: _Optional[float] = ..., shared: _Optional[int] = ...) -> None: ...

class CreateExtensionRequest(_message.Message):
    __slots__ = ("model_id", "task_name", "kind", "lora", "layer", "layers", "freeze_base", "shared_layer_of", "seed", "request_id", "validate_only", "train_shared_layer")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FREEZE_BASE_FIELD_NUMBER: _ClassVar[int]
    SHARED_LAYER_OF_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SHARED_LAYER_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    task_name: str
    kind: ExtensionKind
    lora: LoraConfig
    layer: LayerConfig
    layers: _containers.RepeatedCompositeFieldContainer[LayerConfig]
    freeze_base: bool
    shared_layer_of: str
    seed: int
    request_id: str
    validate_only: bool
    train_shared_layer: bool
    def __init__(self, model_id: _Optional[str] = ..., task_name: _Optional[str] = ..., kind: _Optional[_Union[ExtensionKind, str]] = ..., lora: _Optional[_Union[LoraConfig, _Mapping]] = ..., layer: _Optional[_Union[LayerConfig, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerConfig, _Mapping]]] = ..., freeze_base: _Optional[bool] = ..., shared_layer_of: _Optional[str] = ..., seed: _Optional[int] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ..., train_shared_layer: _Optional[bool] = ...) -> None: ...

class Extension(_message.Message):
    __slots__ = ("id", "model_id", "task_name", "kind", "lora", "layers", "status", "parameter_counts", "artifact_uri", "digest", "size_bytes", "base_digest", "active", "trained_steps", "loss_before", "loss_after", "job_id", "error_code", "error_message", "created_by", "created_at", "freeze_base", "shared_layer_of", "train_shared_layer")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    TRAINED_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FREEZE_BASE_FIELD_NUMBER: _ClassVar[int]
    SHARED_LAYER_OF_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SHARED_LAYER_FIELD_NUMBER: _ClassVar[int]
    id: str
    model_id: str
    task_name: str
    kind: ExtensionKind
    lora: LoraConfig
    layers: _containers.RepeatedCompositeFieldContainer[LayerConfig]
    status: ExtensionStatus
    parameter_counts: ParameterCounts
    artifact_uri: str
    digest: str
    size_bytes: int
    base_digest: str
    active: bool
    trained_steps: int
    loss_before: float
    loss_after: float
    job_id: str
    error_code: str
    error_message: str
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    freeze_base: bool
    shared_layer_of: str
    train_shared_layer: bool
    def __init__(self, id: _Optional[str] = ..., model_id: _Optional[str] = ..., task_name: _Optional[str] = ..., kind: _Optional[_Union[ExtensionKind, str]] = ..., lora: _Optional[_Union[LoraConfig, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerConfig, _Mapping]]] = ..., status: _Optional[_Union[ExtensionStatus, str]] = ..., parameter_counts: _Optional[_Union[ParameterCounts, _Mapping]] = ..., artifact_uri: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., base_digest: _Optional[str] = ..., active: _Optional[bool] = ..., trained_steps: _Optional[int] = ..., loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., job_id: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., freeze_base: _Optional[bool] = ..., shared_layer_of: _Optional[str] = ..., train_shared_layer: _Optional[bool] = ...) -> None: ...

class GetExtensionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListExtensionsRequest(_message.Message):
    __slots__ = ("model_id", "task_name", "limit", "offset", "page_token", "read_mask")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    task_name: str
    limit: int
    offset: int
    page_token: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, model_id: _Optional[str] = ..., task_name: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., page_token: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListExtensionsResponse(_message.Message):
    __slots__ = ("extensions", "total", "limit", "offset", "next_page_token")
    EXTENSIONS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    extensions: _containers.RepeatedCompositeFieldContainer[Extension]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, extensions: _Optional[_Iterable[_Union[Extension, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteExtensionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class TrainExtensionRequest(_message.Message):
    __slots__ = ("id", "dataset_id", "held_out_dataset_id", "steps", "epochs", "batch_size", "learning_rate", "max_length", "seed", "request_id", "gradient_accumulation_steps", "lr_schedule", "warmup_steps", "loraplus_lr_ratio", "weight_decay", "precision", "gradient_checkpointing", "evaluate_every", "patience", "devices")
    ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    LORAPLUS_LR_RATIO_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_EVERY_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    id: str
    dataset_id: str
    held_out_dataset_id: str
    steps: int
    epochs: float
    batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    request_id: str
    gradient_accumulation_steps: int
    lr_schedule: LearningRateSchedule
    warmup_steps: int
    loraplus_lr_ratio: float
    weight_decay: float
    precision: Precision
    gradient_checkpointing: bool
    evaluate_every: int
    patience: int
    devices: int
    def __init__(self, id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., held_out_dataset_id: _Optional[str] = ..., steps: _Optional[int] = ..., epochs: _Optional[float] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., max_length: _Optional[int] = ..., seed: _Optional[int] = ..., request_id: _Optional[str] = ..., gradient_accumulation_steps: _Optional[int] = ..., lr_schedule: _Optional[_Union[LearningRateSchedule, str]] = ..., warmup_steps: _Optional[int] = ..., loraplus_lr_ratio: _Optional[float] = ..., weight_decay: _Optional[float] = ..., precision: _Optional[_Union[Precision, str]] = ..., gradient_checkpointing: _Optional[bool] = ..., evaluate_every: _Optional[int] = ..., patience: _Optional[int] = ..., devices: _Optional[int] = ...) -> None: ...

class TrainExtensionResponse(_message.Message):
    __slots__ = ("job_id", "id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    id: str
    def __init__(self, job_id: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class ActivateExtensionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeactivateExtensionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ExtensionSwitch(_message.Message):
    __slots__ = ("id", "active", "seconds", "memory_before_bytes", "memory_after_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BEFORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    active: bool
    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int
    def __init__(self, id: _Optional[str] = ..., active: _Optional[bool] = ..., seconds: _Optional[float] = ..., memory_before_bytes: _Optional[int] = ..., memory_after_bytes: _Optional[int] = ...) -> None: ...

class GenerateWithExtensionRequest(_message.Message):
    __slots__ = ("id", "prompt", "max_new_tokens", "temperature", "seed")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class MergeExtensionRequest(_message.Message):
    __slots__ = ("id", "name", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    request_id: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class MergeExtensionResponse(_message.Message):
    __slots__ = ("job_id", "id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    id: str
    def __init__(self, job_id: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class ExportExtensionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ImportExtensionRequest(_message.Message):
    __slots__ = ("model_id", "task_name", "identifier", "request_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    task_name: str
    identifier: str
    request_id: str
    def __init__(self, model_id: _Optional[str] = ..., task_name: _Optional[str] = ..., identifier: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class GenerateTogetherRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[GenerateWithExtensionRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[GenerateWithExtensionRequest, _Mapping]]] = ...) -> None: ...

class GenerateTogetherResponse(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedCompositeFieldContainer[_types_pb2.GeneratedText]
    def __init__(self, texts: _Optional[_Iterable[_Union[_types_pb2.GeneratedText, _Mapping]]] = ...) -> None: ...

class EvaluateExtensionRequest(_message.Message):
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

class ExtensionEvaluation(_message.Message):
    __slots__ = ("id", "base_loss", "loss", "tokens", "base_unchanged")
    ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BASE_UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    id: str
    base_loss: float
    loss: float
    tokens: int
    base_unchanged: bool
    def __init__(self, id: _Optional[str] = ..., base_loss: _Optional[float] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., base_unchanged: _Optional[bool] = ...) -> None: ...
