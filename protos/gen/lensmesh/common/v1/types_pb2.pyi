from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Quantization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZATION_UNSPECIFIED: _ClassVar[Quantization]
    QUANTIZATION_NONE: _ClassVar[Quantization]
    QUANTIZATION_FP16: _ClassVar[Quantization]
    QUANTIZATION_BF16: _ClassVar[Quantization]
    QUANTIZATION_INT8: _ClassVar[Quantization]
    QUANTIZATION_INT4: _ClassVar[Quantization]

class ModelSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_SOURCE_UNSPECIFIED: _ClassVar[ModelSource]
    MODEL_SOURCE_HUGGINGFACE: _ClassVar[ModelSource]
    MODEL_SOURCE_LOCAL: _ClassVar[ModelSource]
    MODEL_SOURCE_CUSTOM: _ClassVar[ModelSource]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]

class LensKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LENS_KIND_UNSPECIFIED: _ClassVar[LensKind]
    LENS_KIND_TRANSCODER: _ClassVar[LensKind]
    LENS_KIND_EXTENSION: _ClassVar[LensKind]
    LENS_KIND_LOGIT_LENS: _ClassVar[LensKind]
    LENS_KIND_TUNED_LENS: _ClassVar[LensKind]
    LENS_KIND_TEXT_LENS: _ClassVar[LensKind]
QUANTIZATION_UNSPECIFIED: Quantization
QUANTIZATION_NONE: Quantization
QUANTIZATION_FP16: Quantization
QUANTIZATION_BF16: Quantization
QUANTIZATION_INT8: Quantization
QUANTIZATION_INT4: Quantization
MODEL_SOURCE_UNSPECIFIED: ModelSource
MODEL_SOURCE_HUGGINGFACE: ModelSource
MODEL_SOURCE_LOCAL: ModelSource
MODEL_SOURCE_CUSTOM: ModelSource
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
LENS_KIND_UNSPECIFIED: LensKind
LENS_KIND_TRANSCODER: LensKind
LENS_KIND_EXTENSION: LensKind
LENS_KIND_LOGIT_LENS: LensKind
LENS_KIND_TUNED_LENS: LensKind
LENS_KIND_TEXT_LENS: LensKind

class LensSpec(_message.Message):
    __slots__ = ("lens_id", "kind", "artifact_uri", "base_digest", "layer", "activation_source_model_id")
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_SOURCE_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    lens_id: str
    kind: LensKind
    artifact_uri: str
    base_digest: str
    layer: int
    activation_source_model_id: str
    def __init__(self, lens_id: _Optional[str] = ..., kind: _Optional[_Union[LensKind, str]] = ..., artifact_uri: _Optional[str] = ..., base_digest: _Optional[str] = ..., layer: _Optional[int] = ..., activation_source_model_id: _Optional[str] = ...) -> None: ...

class MemoryBreakdown(_message.Message):
    __slots__ = ("weights", "quantization_state", "activations", "overhead")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_STATE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_FIELD_NUMBER: _ClassVar[int]
    weights: int
    quantization_state: int
    activations: int
    overhead: int
    def __init__(self, weights: _Optional[int] = ..., quantization_state: _Optional[int] = ..., activations: _Optional[int] = ..., overhead: _Optional[int] = ...) -> None: ...

class Eviction(_message.Message):
    __slots__ = ("model_id", "bytes", "cause", "parked", "lens_id", "host_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    bytes: int
    cause: str
    parked: bool
    lens_id: str
    host_id: str
    def __init__(self, model_id: _Optional[str] = ..., bytes: _Optional[int] = ..., cause: _Optional[str] = ..., parked: _Optional[bool] = ..., lens_id: _Optional[str] = ..., host_id: _Optional[str] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("device", "fits", "available_memory_bytes", "evictions", "restores")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    device: str
    fits: bool
    available_memory_bytes: int
    evictions: _containers.RepeatedCompositeFieldContainer[Eviction]
    restores: bool
    def __init__(self, device: _Optional[str] = ..., fits: _Optional[bool] = ..., available_memory_bytes: _Optional[int] = ..., evictions: _Optional[_Iterable[_Union[Eviction, _Mapping]]] = ..., restores: _Optional[bool] = ...) -> None: ...

class LoadPlan(_message.Message):
    __slots__ = ("required_memory_bytes", "breakdown", "placements", "estimated_seconds")
    REQUIRED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BREAKDOWN_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    required_memory_bytes: int
    breakdown: MemoryBreakdown
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    estimated_seconds: float
    def __init__(self, required_memory_bytes: _Optional[int] = ..., breakdown: _Optional[_Union[MemoryBreakdown, _Mapping]] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., estimated_seconds: _Optional[float] = ...) -> None: ...

class PerplexityResult(_message.Message):
    __slots__ = ("perplexity", "loss", "tokens", "samples", "quantization", "seconds", "dataset_id", "over_unquantized")
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    OVER_UNQUANTIZED_FIELD_NUMBER: _ClassVar[int]
    perplexity: float
    loss: float
    tokens: int
    samples: int
    quantization: Quantization
    seconds: float
    dataset_id: str
    over_unquantized: float
    def __init__(self, perplexity: _Optional[float] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., samples: _Optional[int] = ..., quantization: _Optional[_Union[Quantization, str]] = ..., seconds: _Optional[float] = ..., dataset_id: _Optional[str] = ..., over_unquantized: _Optional[float] = ...) -> None: ...

class ModelDefaults(_message.Message):
    __slots__ = ("dict_size", "group_sizes", "top_k", "model_batch_size", "dtype", "hook_points", "experimental")
    DICT_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MODEL_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENTAL_FIELD_NUMBER: _ClassVar[int]
    dict_size: int
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    model_batch_size: int
    dtype: Dtype
    hook_points: _containers.RepeatedCompositeFieldContainer[HookPoint]
    experimental: bool
    def __init__(self, dict_size: _Optional[int] = ..., group_sizes: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., model_batch_size: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., hook_points: _Optional[_Iterable[_Union[HookPoint, _Mapping]]] = ..., experimental: _Optional[bool] = ...) -> None: ...

class HookPoint(_message.Message):
    __slots__ = ("site", "name")
    SITE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    site: str
    name: str
    def __init__(self, site: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class TokenReading(_message.Message):
    __slots__ = ("position", "token_id", "token", "features", "fvu", "layers", "base_predictions", "predictions")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BASE_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    position: int
    token_id: int
    token: str
    features: _containers.RepeatedCompositeFieldContainer[FeatureActivation]
    fvu: float
    layers: _containers.RepeatedCompositeFieldContainer[LayerReadout]
    base_predictions: _containers.RepeatedCompositeFieldContainer[TokenProbability]
    predictions: _containers.RepeatedCompositeFieldContainer[TokenProbability]
    def __init__(self, position: _Optional[int] = ..., token_id: _Optional[int] = ..., token: _Optional[str] = ..., features: _Optional[_Iterable[_Union[FeatureActivation, _Mapping]]] = ..., fvu: _Optional[float] = ..., layers: _Optional[_Iterable[_Union[LayerReadout, _Mapping]]] = ..., base_predictions: _Optional[_Iterable[_Union[TokenProbability, _Mapping]]] = ..., predictions: _Optional[_Iterable[_Union[TokenProbability, _Mapping]]] = ...) -> None: ...

class FeatureActivation(_message.Message):
    __slots__ = ("feature", "activation")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    feature: int
    activation: float
    def __init__(self, feature: _Optional[int] = ..., activation: _Optional[float] = ...) -> None: ...

class LayerReadout(_message.Message):
    __slots__ = ("layer", "predictions")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    predictions: _containers.RepeatedCompositeFieldContainer[TokenProbability]
    def __init__(self, layer: _Optional[int] = ..., predictions: _Optional[_Iterable[_Union[TokenProbability, _Mapping]]] = ...) -> None: ...

class TokenProbability(_message.Message):
    __slots__ = ("token_id", "token", "probability")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: str
    probability: float
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class LensReading(_message.Message):
    __slots__ = ("lens_id", "kind", "tokens", "fvu")
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    lens_id: str
    kind: LensKind
    tokens: _containers.RepeatedCompositeFieldContainer[TokenReading]
    fvu: float
    def __init__(self, lens_id: _Optional[str] = ..., kind: _Optional[_Union[LensKind, str]] = ..., tokens: _Optional[_Iterable[_Union[TokenReading, _Mapping]]] = ..., fvu: _Optional[float] = ...) -> None: ...

class InterventionSpec(_message.Message):
    __slots__ = ("site", "layer", "op", "vector", "transcoder_id", "feature", "factor", "positions")
    class Op(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OP_UNSPECIFIED: _ClassVar[InterventionSpec.Op]
        OP_REPLACE: _ClassVar[InterventionSpec.Op]
        OP_ADD: _ClassVar[InterventionSpec.Op]
        OP_SCALE: _ClassVar[InterventionSpec.Op]
        OP_ZERO: _ClassVar[InterventionSpec.Op]
        OP_MEAN: _ClassVar[InterventionSpec.Op]
    OP_UNSPECIFIED: InterventionSpec.Op
    OP_REPLACE: InterventionSpec.Op
    OP_ADD: InterventionSpec.Op
    OP_SCALE: InterventionSpec.Op
    OP_ZERO: InterventionSpec.Op
    OP_MEAN: InterventionSpec.Op
    SITE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    site: str
    layer: int
    op: InterventionSpec.Op
    vector: _containers.RepeatedScalarFieldContainer[float]
    transcoder_id: str
    feature: int
    factor: float
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, site: _Optional[str] = ..., layer: _Optional[int] = ..., op: _Optional[_Union[InterventionSpec.Op, str]] = ..., vector: _Optional[_Iterable[float]] = ..., transcoder_id: _Optional[str] = ..., feature: _Optional[int] = ..., factor: _Optional[float] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class GeneratedText(_message.Message):
    __slots__ = ("text", "token_ids", "seconds")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ...) -> None: ...
