from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
POLICY_FIELD_NUMBER: _ClassVar[int]
policy: _descriptor.FieldDescriptor

class Policy(_message.Message):
    __slots__ = ("scopes", "rate_class", "success_status", "internal", "public", "websocket")
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    RATE_CLASS_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_STATUS_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    WEBSOCKET_FIELD_NUMBER: _ClassVar[int]
    scopes: _containers.RepeatedScalarFieldContainer[str]
    rate_class: str
    success_status: int
    internal: bool
    public: bool
    websocket: bool
    def __init__(self, scopes: _Optional[_Iterable[str]] = ..., rate_class: _Optional[str] = ..., success_status: _Optional[int] = ..., internal: _Optional[bool] = ..., public: _Optional[bool] = ..., websocket: _Optional[bool] = ...) -> None: ...
