"""Domain objects to protos and back, field by field of the same name: enums are words, times are datetimes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from lensmesh.registry.v1 import devices_pb2

from services.registry.domain import HostedLens, HostedModel

M = TypeVar("M", bound=Message)


def to_message(message_class: type[M], source: object, /, **more: Any) -> M:
    """A message from the attributes or items of `source`, and from `more`; None leaves a field unset."""
    message = message_class()
    for field in message.DESCRIPTOR.fields:
        value = more[field.name] if field.name in more else _read(source, field.name)
        if value is not None:
            _fill(message, field, value)
    return message


def to_dict(message: Message) -> dict[str, Any]:
    """Every field by name; unset optional fields are None, unspecified enums empty."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def to_json(message: Message) -> dict[str, Any]:
    """The message as clients of HTTP see it: words, ISO 8601 times, unset optional fields left out."""
    return {name: _json(value) for name, value in to_dict(message).items() if value is not None}


def word(enum: EnumDescriptor, number: int) -> str:
    """`int8` for QUANTIZATION_INT8; empty for the unspecified value."""
    return "" if number == 0 else enum.values_by_number[number].name.removeprefix(_prefix(enum)).lower()


def plain(value: Any) -> Any:
    """JSON data without the floats that protobuf makes of integers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


@cache
def _prefix(enum: EnumDescriptor) -> str:
    return enum.values_by_number[0].name.removesuffix("UNSPECIFIED")


def hosted(message: devices_pb2.HostedModel) -> HostedModel:
    """A model as its host reports it."""
    fields = to_dict(message)
    fields["lenses"] = {
        lens.lens_id: HostedLens(lens.memory_bytes, lens.leases, lens.idle_seconds, lens.parked)
        for lens in message.lenses
    }
    fields["active_lens_id"] = message.active_lens_id or None
    return HostedModel(**fields)


def _read(source: object, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _fill(message: Message, field: FieldDescriptor, value: Any) -> None:
    target = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is None:
            target.extend(value)
        else:
            for item in value:
                _copy(target.add(), item)
    elif field.message_type is not None:
        _copy(target, value)
    elif field.enum_type is not None and isinstance(value, str):
        number = field.enum_type.values_by_name[_prefix(field.enum_type) + value.upper()].number if value else 0
        setattr(message, field.name, number)
    else:
        setattr(message, field.name, value)


def _copy(target: Message, value: Any) -> None:
    target.SetInParent()
    if isinstance(value, Message):
        target.CopyFrom(value)
    elif isinstance(target, Timestamp):
        target.FromDatetime(value)
    elif isinstance(target, Struct):
        target.update(value)
    else:
        target.CopyFrom(to_message(type(target), value))


def _value(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_single(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None:
        return word(field.enum_type, value)
    if isinstance(value, Timestamp):
        return _datetime(value)
    if isinstance(value, Struct):
        return plain(MessageToDict(value))
    return to_dict(value) if isinstance(value, Message) else value


def _json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items() if item is not None}
    return [_json(item) for item in value] if isinstance(value, list) else value


def _datetime(value: Timestamp) -> datetime:
    return value.ToDatetime(tzinfo=UTC)
