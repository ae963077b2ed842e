import datetime

from buf.validate import validate_pb2 as _validate_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from lensmesh.common.v1 import types_pb2 as _types_pb2
from lensmesh.http.v1 import http_pb2 as _http_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResidentModel(_message.Message):
    __slots__ = ("model_id", "memory_bytes", "leases", "last_used_at")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    memory_bytes: int
    leases: int
    last_used_at: _timestamp_pb2.Timestamp
    def __init__(self, model_id: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., leases: _Optional[int] = ..., last_used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "device", "host_id", "kind", "services", "total_bytes", "budget_bytes", "used_bytes", "reserved_bytes", "models", "temperature_celsius", "utilization_ratio", "alive", "heartbeat_at", "park_bytes", "parked_bytes", "parked_models", "external_bytes", "power_watts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_RATIO_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AT_FIELD_NUMBER: _ClassVar[int]
    PARK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARKED_MODELS_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    device: str
    host_id: str
    kind: str
    services: _containers.RepeatedScalarFieldContainer[str]
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    reserved_bytes: int
    models: _containers.RepeatedCompositeFieldContainer[ResidentModel]
    temperature_celsius: float
    utilization_ratio: float
    alive: bool
    heartbeat_at: _timestamp_pb2.Timestamp
    park_bytes: int
    parked_bytes: int
    parked_models: _containers.RepeatedCompositeFieldContainer[ResidentModel]
    external_bytes: int
    power_watts: float
    def __init__(self, name: _Optional[str] = ..., device: _Optional[str] = ..., host_id: _Optional[str] = ..., kind: _Optional[str] = ..., services: _Optional[_Iterable[str]] = ..., total_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ResidentModel, _Mapping]]] = ..., temperature_celsius: _Optional[float] = ..., utilization_ratio: _Optional[float] = ..., alive: _Optional[bool] = ..., heartbeat_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., park_bytes: _Optional[int] = ..., parked_bytes: _Optional[int] = ..., parked_models: _Optional[_Iterable[_Union[ResidentModel, _Mapping]]] = ..., external_bytes: _Optional[int] = ..., power_watts: _Optional[float] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices", "total")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    total: int
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class ClearDeviceRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ClearDeviceResponse(_message.Message):
    __slots__ = ("model_ids", "freed_bytes")
    MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_ids: _containers.RepeatedScalarFieldContainer[str]
    freed_bytes: int
    def __init__(self, model_ids: _Optional[_Iterable[str]] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class RegisterHostRequest(_message.Message):
    __slots__ = ("host_id", "incarnation", "address", "device", "kind", "total_bytes", "budget_bytes", "services", "models", "park_bytes", "accelerator")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PARK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    incarnation: str
    address: str
    device: str
    kind: str
    total_bytes: int
    budget_bytes: int
    services: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedCompositeFieldContainer[HostedModel]
    park_bytes: int
    accelerator: str
    def __init__(self, host_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., kind: _Optional[str] = ..., total_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., services: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[_Union[HostedModel, _Mapping]]] = ..., park_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ...) -> None: ...

class HostedModel(_message.Message):
    __slots__ = ("model_id", "quantization", "memory_bytes", "lenses", "active_lens_id", "fingerprint", "leases", "idle_seconds", "parked")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENSES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LENS_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    quantization: _types_pb2.Quantization
    memory_bytes: int
    lenses: _containers.RepeatedCompositeFieldContainer[HostedLens]
    active_lens_id: str
    fingerprint: str
    leases: int
    idle_seconds: float
    parked: bool
    def __init__(self, model_id: _Optional[str] = ..., quantization: _Optional[_Union[_types_pb2.Quantization, str]] = ..., memory_bytes: _Optional[int] = ..., lenses: _Optional[_Iterable[_Union[HostedLens, _Mapping]]] = ..., active_lens_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., leases: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., parked: _Optional[bool] = ...) -> None: ...

class HostedLens(_message.Message):
    __slots__ = ("lens_id", "memory_bytes", "leases", "idle_seconds", "parked")
    LENS_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    lens_id: str
    memory_bytes: int
    leases: int
    idle_seconds: float
    parked: bool
    def __init__(self, lens_id: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., leases: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., parked: _Optional[bool] = ...) -> None: ...

class RegisterHostResponse(_message.Message):
    __slots__ = ("heartbeat_seconds",)
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    heartbeat_seconds: float
    def __init__(self, heartbeat_seconds: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("host_id", "incarnation", "models", "used_bytes", "temperature_celsius", "utilization_ratio", "power_watts", "device_used_bytes", "process_bytes")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_RATIO_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    incarnation: str
    models: _containers.RepeatedCompositeFieldContainer[HostedModel]
    used_bytes: int
    temperature_celsius: float
    utilization_ratio: float
    power_watts: float
    device_used_bytes: int
    process_bytes: int
    def __init__(self, host_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., models: _Optional[_Iterable[_Union[HostedModel, _Mapping]]] = ..., used_bytes: _Optional[int] = ..., temperature_celsius: _Optional[float] = ..., utilization_ratio: _Optional[float] = ..., power_watts: _Optional[float] = ..., device_used_bytes: _Optional[int] = ..., process_bytes: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("register_again",)
    REGISTER_AGAIN_FIELD_NUMBER: _ClassVar[int]
    register_again: bool
    def __init__(self, register_again: _Optional[bool] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("host_id", "owner", "bytes", "ranks", "model_ids")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    owner: str
    bytes: int
    ranks: int
    model_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host_id: _Optional[str] = ..., owner: _Optional[str] = ..., bytes: _Optional[int] = ..., ranks: _Optional[int] = ..., model_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class MakeRoomRequest(_message.Message):
    __slots__ = ("host_id", "model_ids")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    model_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host_id: _Optional[str] = ..., model_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("owner", "bytes", "devices")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    owner: str
    bytes: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, owner: _Optional[str] = ..., bytes: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("host_id", "owner")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    owner: str
    def __init__(self, host_id: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class EnsureResidentRequest(_message.Message):
    __slots__ = ("host_id", "model_id")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    model_id: str
    def __init__(self, host_id: _Optional[str] = ..., model_id: _Optional[str] = ...) -> None: ...

class LocateModelRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class ModelLocation(_message.Message):
    __slots__ = ("model_id", "host_id", "address", "device")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    host_id: str
    address: str
    device: str
    def __init__(self, model_id: _Optional[str] = ..., host_id: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class SwitchExtensionRequest(_message.Message):
    __slots__ = ("model_id", "extension_id", "artifact_uri", "base_digest")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    extension_id: str
    artifact_uri: str
    base_digest: str
    def __init__(self, model_id: _Optional[str] = ..., extension_id: _Optional[str] = ..., artifact_uri: _Optional[str] = ..., base_digest: _Optional[str] = ...) -> None: ...

class SwitchExtensionResponse(_message.Message):
    __slots__ = ("seconds", "memory_before_bytes", "memory_after_bytes", "active_extension_id")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BEFORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_EXTENSION_ID_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int
    active_extension_id: str
    def __init__(self, seconds: _Optional[float] = ..., memory_before_bytes: _Optional[int] = ..., memory_after_bytes: _Optional[int] = ..., active_extension_id: _Optional[str] = ...) -> None: ...
