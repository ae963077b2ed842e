"""JSON -> protobuf, with the conventions of the HTTP contract; every wrong field is named by its path."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gateway import names
from gateway.body import MAX_DEPTH, too_deep
from services.kit.errors import Invalid

Wrong = list[tuple[str, str]]
_MOST_WRONG = 20
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT: 3.4028235677973366e38, FieldDescriptor.CPPTYPE_DOUBLE: math.inf}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def decode(message: Message, value: object, *, at: str = "") -> None:
    """Fill `message` from a JSON value.

    Args:
        message: an empty message of the wanted type.
        value: what `json.loads` gives.
        at: path of the value in the request, for messages.

    Raises:
        Invalid: unknown or wrong fields, each named.
        TooLarge: nested deeper than `MAX_DEPTH`.
    """
    decoder = _Decoder()
    decoder.message(message, value, at, 0)
    refuse(decoder.wrong)


def refuse(wrong: Wrong) -> None:
    """Raise Invalid naming every wrong field, at most twenty of them, unless there is none."""
    if wrong:
        listed = wrong[:_MOST_WRONG]
        raise Invalid("; ".join(f"{field}: {said}" for field, said in listed), violations=listed)


def scalar(field: FieldDescriptor, value: object) -> Any:
    """One scalar or enum value of a field.

    Raises:
        ValueError: it does not fit the field; the message says what would.
    """
    if field.cpp_type in _INTEGERS:
        return _integer(value, *_INTEGERS[field.cpp_type])
    if field.cpp_type in _FLOATS:
        return _float(value, _FLOATS[field.cpp_type])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        number = names.numbers(field.enum_type).get(value) if isinstance(value, str) else None
        if number is None:
            raise ValueError("must be one of " + ", ".join(names.accepted(field.enum_type)))
        return number
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return _base64(value) if field.type == FieldDescriptor.TYPE_BYTES else _text(value)


class _Decoder:
    """Walks message and value side by side, and goes on behind a wrong field to name the others too."""

    def __init__(self) -> None:
        self.wrong: Wrong = []

    def message(self, message: Message, value: object, at: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise too_deep()
        special = WELL_KNOWN.get(message.DESCRIPTOR.full_name)
        if special is not None:
            try:
                special(message, value, depth)
            except ValueError as error:
                self.wrong.append((at or "body", str(error)))
        elif isinstance(value, dict):
            self._fields(message, value, at, depth)
        else:
            self.wrong.append((at or "body", "must be an object"))

    def _fields(self, message: Message, value: dict[str, object], at: str, depth: int) -> None:
        chosen: dict[str, str] = {}
        for name, item in value.items():
            field = message.DESCRIPTOR.fields_by_name.get(name)
            path = f"{at}.{_shown(name)}" if at else _shown(name)
            if field is None:
                self.wrong.append((path, "is not a field of this request"))
                continue
            if item is None and not _is_value(field):
                continue
            oneof = field.containing_oneof
            if oneof is not None and chosen.setdefault(oneof.name, name) != name:
                self.wrong.append((path, f"excludes {chosen[oneof.name]}"))
                continue
            self._field(message, field, item, path, depth)

    def _field(self, message: Message, field: FieldDescriptor, value: object, path: str, depth: int) -> None:
        if names.is_map(field):
            self._map(getattr(message, field.name), field, value, path, depth)
        elif field.is_repeated:
            self._list(getattr(message, field.name), field, value, path, depth)
        elif field.message_type is not None:
            target = getattr(message, field.name)
            target.SetInParent()
            self.message(target, value, path, depth + 1)
        else:
            self._set(partial(setattr, message, field.name), field, value, path)

    def _list(self, target: Any, field: FieldDescriptor, value: object, path: str, depth: int) -> None:
        if not isinstance(value, list):
            self.wrong.append((path, "must be a list"))
            return
        for index, item in enumerate(value):
            if field.message_type is not None:
                self.message(target.add(), item, f"{path}[{index}]", depth + 1)
            else:
                self._set(target.append, field, item, f"{path}[{index}]")

    def _map(self, target: Any, field: FieldDescriptor, value: object, path: str, depth: int) -> None:
        if not isinstance(value, dict):
            self.wrong.append((path, "must be an object"))
            return
        key_field, value_field = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for name, item in value.items():
            inner = f"{path}[{_shown(name)}]"
            try:
                key = scalar(key_field, from_text(key_field, name))
            except ValueError as error:
                self.wrong.append((inner, f"key {error}"))
                continue
            if value_field.message_type is not None:
                self.message(target[key], item, inner, depth + 1)
            else:
                self._set(partial(target.__setitem__, key), value_field, item, inner)

    def _set(self, store: Callable[[Any], object], field: FieldDescriptor, value: object, path: str) -> None:
        try:
            store(scalar(field, value))
        except ValueError as error:
            self.wrong.append((path, str(error)))


def from_text(field: FieldDescriptor, text: str) -> object:
    """The JSON value that a query parameter, a path segment or a map key means for this field."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"true": True, "false": False}.get(text, text)
    if field.cpp_type in _FLOATS and re.fullmatch(r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?", text):
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _integer(value: object, least: int, most: int) -> int:
    if (isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value)) or (
        isinstance(value, float) and value.is_integer()
    ):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    if not least <= value <= most:
        raise ValueError(f"must be between {least} and {most}")
    return value


def _float(value: object, most: float) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        made = float(value)
    except OverflowError as error:
        raise ValueError("is too large a number") from error
    if not math.isfinite(made) or abs(made) >= most:
        raise ValueError("is too large a number")
    return made


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair") from error
    return value


def _base64(value: str) -> bytes:
    try:
        return base64.b64decode(value.translate(str.maketrans("-_", "+/")) + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("must be base64") from error


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()[:100]


def _is_value(field: FieldDescriptor) -> bool:
    return (
        field.message_type is not None
        and field.message_type.full_name == "google.protobuf.Value"
        and not field.is_repeated
    )


def _from_string(message: Any, value: object, _depth: int) -> None:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        message.FromJsonString(value)
    except (ValueError, OverflowError) as error:
        example = "2025-10-06T10:00:00Z" if message.DESCRIPTOR.name == "Timestamp" else "3.5s"
        raise ValueError(f"must be a {message.DESCRIPTOR.name.lower()} such as {example}") from error


def _mask(message: Any, value: object, _depth: int) -> None:
    if not isinstance(value, str):
        raise ValueError("must be field names separated by commas")
    message.paths.extend(part.strip() for part in value.split(",") if part.strip())


def _wrapper(message: Any, value: object, _depth: int) -> None:
    message.value = scalar(message.DESCRIPTOR.fields_by_name["value"], value)


def _struct(message: Any, value: object, depth: int) -> None:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    for name, item in value.items():
        _value(message.fields[_text(name)], item, depth + 1)


def _list(message: Any, value: object, depth: int) -> None:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    for item in value:
        _value(message.values.add(), item, depth + 1)


def _value(message: Any, value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise too_deep()
    if value is None:
        message.null_value = 0
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, int | float):
        message.number_value = _float(value, math.inf)
    elif isinstance(value, str):
        message.string_value = _text(value)
    elif isinstance(value, dict):
        message.struct_value.SetInParent()
        _struct(message.struct_value, value, depth)
    else:
        message.list_value.SetInParent()
        _list(message.list_value, value, depth)


_WRAPPERS = ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
WELL_KNOWN: dict[str, Callable[[Any, object, int], None]] = {
    "google.protobuf.Timestamp": _from_string,
    "google.protobuf.Duration": _from_string,
    "google.protobuf.FieldMask": _mask,
    "google.protobuf.Struct": _struct,
    "google.protobuf.Value": _value,
    "google.protobuf.ListValue": _list,
    **{f"google.protobuf.{name}Value": _wrapper for name in _WRAPPERS},
}
"""Messages with a JSON form of their own."""
