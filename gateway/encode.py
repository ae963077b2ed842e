"""Protobuf -> JSON, with the conventions of the HTTP contract."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gateway import names

_WHOLE = 2.0**53


def encode(message: Message) -> Any:
    """The JSON value of a message.

    Fields without presence are always there, optional fields and messages only when set; an enum without presence is
    left out while unspecified.
    """
    special = WELL_KNOWN.get(message.DESCRIPTOR.full_name)
    if special is not None:
        return special(message)
    made: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if names.is_map(field):
            inner = field.message_type.fields_by_name["value"]
            made[field.name] = {_key(key): _one(inner, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            made[field.name] = [_one(field, item) for item in value]
        elif not _left_out(field, value):
            made[field.name] = _one(field, value)
    return made


def dumps(value: object) -> bytes:
    """JSON text in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def prune(value: Any, paths: Iterable[str]) -> Any:
    """Only the named paths (`a.b`) of a JSON object; lists are pruned item by item."""
    wanted: dict[str, list[str]] = {}
    for path in paths:
        head, _, rest = path.partition(".")
        wanted.setdefault(head, []).append(rest)
    if isinstance(value, list):
        return [prune(item, paths) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: item if "" in wanted[name] else prune(item, wanted[name])
        for name, item in value.items()
        if name in wanted
    }


def number(value: float) -> float | int | str:
    """A double in JSON: whole ones without a fraction, non-finite ones as protobuf's words."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    whole = value.is_integer() and abs(value) < _WHOLE and not (value == 0 and math.copysign(1, value) < 0)
    return int(value) if whole else value


def _left_out(field: FieldDescriptor, value: Any) -> bool:
    if field.cpp_type != FieldDescriptor.CPPTYPE_ENUM or field.has_presence or value:
        return False
    return field.enum_type.values[0].name.endswith(names.UNSPECIFIED)


def _one(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return encode(value)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return names.words(field.enum_type).get(value, value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        return number(_shortest(value))
    return number(value) if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE else value


def _shortest(value: float) -> float:
    if not math.isfinite(value):
        return value
    exact = struct.pack("<f", value)
    return next(short for digits in range(6, 10) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == exact)


def _key(key: object) -> str:
    return ("true" if key else "false") if isinstance(key, bool) else str(key)


def _wrapper(message: Any) -> Any:
    return _one(message.DESCRIPTOR.fields_by_name["value"], message.value)


def _struct(message: Any) -> dict[str, Any]:
    return {name: _value(message.fields[name]) for name in sorted(message.fields)}


def _list(message: Any) -> list[Any]:
    return [_value(item) for item in message.values]


def _value(message: Any) -> Any:
    kind = message.WhichOneof("kind")
    if kind == "struct_value":
        return _struct(message.struct_value)
    if kind == "list_value":
        return _list(message.list_value)
    if kind == "number_value":
        return number(message.number_value)
    return None if kind in (None, "null_value") else getattr(message, kind)


_WRAPPERS = ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
WELL_KNOWN: Mapping[str, Callable[[Any], Any]] = {
    "google.protobuf.Timestamp": lambda message: message.ToJsonString(),
    "google.protobuf.Duration": lambda message: message.ToJsonString(),
    "google.protobuf.FieldMask": lambda message: ",".join(message.paths),
    "google.protobuf.Struct": _struct,
    "google.protobuf.Value": _value,
    "google.protobuf.ListValue": _list,
    **{f"google.protobuf.{name}Value": _wrapper for name in _WRAPPERS},
}
"""Messages with a JSON form of their own."""
