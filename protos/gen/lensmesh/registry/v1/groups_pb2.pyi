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

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    RESIDENCY_DEVICE: _ClassVar[Residency]
    RESIDENCY_PARKED: _ClassVar[Residency]
    RESIDENCY_DISK: _ClassVar[Residency]
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_DEVICE: Residency
RESIDENCY_PARKED: Residency
RESIDENCY_DISK: Residency

class Lens(_message.Message):
    __slots__ = ("id", "group_id", "kind", "transcoder_id", "extension_id", "artifact_uri", "activation_source_model_id", "residency", "memory_bytes", "layer", "error_code", "error_message", "created_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_SOURCE_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    group_id: str
    kind: _types_pb2.LensKind
    transcoder_id: str
    extension_id: str
    artifact_uri: str
    activation_source_model_id: str
    residency: Residency
    memory_bytes: int
    layer: int
    error_code: str
    error_message: str
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., group_id: _Optional[str] = ..., kind: _Optional[_Union[_types_pb2.LensKind, str]] = ..., transcoder_id: _Optional[str] = ..., extension_id: _Optional[str] = ..., artifact_uri: _Optional[str] = ..., activation_source_model_id: _Optional[str] = ..., residency: _Optional[_Union[Residency, str]] = ..., memory_bytes: _Optional[int] = ..., layer: _Optional[int] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "name", "model_id", "lenses", "active_lens_id", "estimated_memory_bytes", "created_by", "created_at", "exclusive")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LENSES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LENS_ID_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    model_id: str
    lenses: _containers.RepeatedCompositeFieldContainer[Lens]
    active_lens_id: str
    estimated_memory_bytes: int
    created_by: str
    created_at: _timestamp_pb2.Timestamp
    exclusive: bool
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., model_id: _Optional[str] = ..., lenses: _Optional[_Iterable[_Union[Lens, _Mapping]]] = ..., active_lens_id: _Optional[str] = ..., estimated_memory_bytes: _Optional[int] = ..., created_by: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., exclusive: _Optional[bool] = ...) -> None: ...

class CreateGroupRequest(_message.Message):
    __slots__ = ("name", "model_id", "request_id", "exclusive")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_id: str
    request_id: str
    exclusive: bool
    def __init__(self, name: _Optional[str] = ..., model_id: _Optional[str] = ..., request_id: _Optional[str] = ..., exclusive: _Optional[bool] = ...) -> None: ...

class GetGroupRequest(_message.Message):
    __slots__ = ("id", "read_mask")
    ID_FIELD_NUMBER: _ClassVar[int]
    READ_MASK_FIELD_NUMBER: _ClassVar[int]
    id: str
    read_mask: _field_mask_pb2.FieldMask
    def __init__(self, id: _Optional[str] = ..., read_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class ListGroupsRequest(_message.Message):
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

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups", "total", "limit", "offset", "next_page_token")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    total: int
    limit: int
    offset: int
    next_page_token: str
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., total: _Optional[int] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteGroupRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetGroupStatusRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class SwitchEstimate(_message.Message):
    __slots__ = ("within_group", "cross_group")
    WITHIN_GROUP_FIELD_NUMBER: _ClassVar[int]
    CROSS_GROUP_FIELD_NUMBER: _ClassVar[int]
    within_group: float
    cross_group: float
    def __init__(self, within_group: _Optional[float] = ..., cross_group: _Optional[float] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("id", "residency", "device", "resident_lens_ids", "fully_loaded", "active_lens_id", "shared_bytes", "lens_bytes", "saved_bytes", "estimated_switch_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_LENS_IDS_FIELD_NUMBER: _ClassVar[int]
    FULLY_LOADED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LENS_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SWITCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    residency: Residency
    device: str
    resident_lens_ids: _containers.RepeatedScalarFieldContainer[str]
    fully_loaded: bool
    active_lens_id: str
    shared_bytes: int
    lens_bytes: int
    saved_bytes: int
    estimated_switch_seconds: SwitchEstimate
    def __init__(self, id: _Optional[str] = ..., residency: _Optional[_Union[Residency, str]] = ..., device: _Optional[str] = ..., resident_lens_ids: _Optional[_Iterable[str]] = ..., fully_loaded: _Optional[bool] = ..., active_lens_id: _Optional[str] = ..., shared_bytes: _Optional[int] = ..., lens_bytes: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., estimated_switch_seconds: _Optional[_Union[SwitchEstimate, _Mapping]] = ...) -> None: ...

class AttachLensRequest(_message.Message):
    __slots__ = ("group_id", "kind", "transcoder_id", "extension_id", "artifact_uri", "activation_source_model_id", "request_id")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TRANSCODER_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_SOURCE_MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    kind: _types_pb2.LensKind
    transcoder_id: str
    extension_id: str
    artifact_uri: str
    activation_source_model_id: str
    request_id: str
    def __init__(self, group_id: _Optional[str] = ..., kind: _Optional[_Union[_types_pb2.LensKind, str]] = ..., transcoder_id: _Optional[str] = ..., extension_id: _Optional[str] = ..., artifact_uri: _Optional[str] = ..., activation_source_model_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class DetachLensRequest(_message.Message):
    __slots__ = ("group_id", "lens_id")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    lens_id: str
    def __init__(self, group_id: _Optional[str] = ..., lens_id: _Optional[str] = ...) -> None: ...

class SwitchLensRequest(_message.Message):
    __slots__ = ("id", "lens_id", "validate_only", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    lens_id: str
    validate_only: bool
    request_id: str
    def __init__(self, id: _Optional[str] = ..., lens_id: _Optional[str] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class SwitchLensResponse(_message.Message):
    __slots__ = ("lens_id", "seconds", "memory_before_bytes", "memory_after_bytes", "job_id", "position", "estimated_seconds", "plan")
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BEFORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    lens_id: str
    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int
    job_id: str
    position: int
    estimated_seconds: float
    plan: _types_pb2.LoadPlan
    def __init__(self, lens_id: _Optional[str] = ..., seconds: _Optional[float] = ..., memory_before_bytes: _Optional[int] = ..., memory_after_bytes: _Optional[int] = ..., job_id: _Optional[str] = ..., position: _Optional[int] = ..., estimated_seconds: _Optional[float] = ..., plan: _Optional[_Union[_types_pb2.LoadPlan, _Mapping]] = ...) -> None: ...

class PreloadGroupRequest(_message.Message):
    __slots__ = ("id", "lens_ids", "residency", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    LENS_IDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    lens_ids: _containers.RepeatedScalarFieldContainer[str]
    residency: Residency
    request_id: str
    def __init__(self, id: _Optional[str] = ..., lens_ids: _Optional[_Iterable[str]] = ..., residency: _Optional[_Union[Residency, str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class PreloadGroupResponse(_message.Message):
    __slots__ = ("id", "total", "task_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    total: int
    task_id: str
    def __init__(self, id: _Optional[str] = ..., total: _Optional[int] = ..., task_id: _Optional[str] = ...) -> None: ...

class MoveGroupRequest(_message.Message):
    __slots__ = ("id", "device", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    device: str
    request_id: str
    def __init__(self, id: _Optional[str] = ..., device: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class AnalyzeTextRequest(_message.Message):
    __slots__ = ("id", "text", "token_ids", "lens_ids", "top_k", "prefix", "interventions")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LENS_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    lens_ids: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    prefix: int
    interventions: _containers.RepeatedCompositeFieldContainer[_types_pb2.InterventionSpec]
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., lens_ids: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., prefix: _Optional[int] = ..., interventions: _Optional[_Iterable[_Union[_types_pb2.InterventionSpec, _Mapping]]] = ...) -> None: ...

class AnalyzeTextResponse(_message.Message):
    __slots__ = ("readings", "seconds")
    READINGS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    readings: _containers.RepeatedCompositeFieldContainer[_types_pb2.LensReading]
    seconds: float
    def __init__(self, readings: _Optional[_Iterable[_Union[_types_pb2.LensReading, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...
