"""JSON Schema (2020-12) of messages, as `encode` writes them and `decode` takes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway import names, rules
from gateway.comments import Comments

Schema = dict[str, Any]
_FLOAT_MAX = 3.4028234663852886e38
_INTEGER = {"type": "integer"}
_SCALARS: dict[int, Schema] = {
    FieldDescriptor.CPPTYPE_INT32: _INTEGER | {"format": "int32"},
    FieldDescriptor.CPPTYPE_INT64: _INTEGER | {"format": "int64"},
    FieldDescriptor.CPPTYPE_UINT32: _INTEGER | {"minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.CPPTYPE_UINT64: _INTEGER | {"minimum": 0, "maximum": 2**64 - 1},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float", "minimum": -_FLOAT_MAX, "maximum": _FLOAT_MAX},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
}
_STRING = {"type": "string"}
_BASE64 = _STRING | {
    "contentEncoding": "base64",
    "pattern": "^(?:[A-Za-z0-9+/_-]{4})*(?:[A-Za-z0-9+/_-]{2}(?:==)?|[A-Za-z0-9+/_-]{3}=?)?$",
}
_KEYS = {
    FieldDescriptor.CPPTYPE_INT32: "^-?[0-9]{1,9}$",
    FieldDescriptor.CPPTYPE_INT64: "^-?[0-9]{1,18}$",
    FieldDescriptor.CPPTYPE_UINT32: "^[0-9]{1,9}$",
    FieldDescriptor.CPPTYPE_UINT64: "^[0-9]{1,18}$",
    FieldDescriptor.CPPTYPE_BOOL: "^(true|false)$",
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": _STRING | {"format": "date-time"},
    "google.protobuf.Duration": _STRING | {"pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": _STRING | {"description": "Field names, separated by commas."},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array"},
    "google.protobuf.DoubleValue": {"type": "number"},
    "google.protobuf.FloatValue": {"type": "number"},
    "google.protobuf.Int64Value": _INTEGER,
    "google.protobuf.UInt64Value": _INTEGER,
    "google.protobuf.Int32Value": _INTEGER,
    "google.protobuf.UInt32Value": _INTEGER,
    "google.protobuf.BoolValue": {"type": "boolean"},
    "google.protobuf.StringValue": _STRING,
    "google.protobuf.BytesValue": _BASE64,
}


class Schemas:
    """Builds schemas and collects the components that they refer to.

    A message has two forms: as a request it may leave out what is not required and takes no other field; as a reply it
    always has the fields without presence.
    """

    def __init__(self, comments: Comments) -> None:
        """Start without components; `comments` become descriptions."""
        self.components: dict[str, Schema] = {}
        self._comments = comments

    def message(self, descriptor: Descriptor, *, request: bool) -> Schema:
        """A reference to the message's component, or the schema of a well-known type."""
        if descriptor.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[descriptor.full_name])
        name = descriptor.full_name + (".Input" if request and not descriptor.full_name.endswith("Request") else "")
        if name not in self.components:
            self.components[name] = {}  # a message may hold itself
            self.components[name] = self.properties(descriptor, request=request)
        return {"$ref": f"#/components/schemas/{name}"}

    def properties(self, descriptor: Descriptor, *, request: bool, without: Collection[str] = ()) -> Schema:
        """The object schema of a message, some of its fields left out."""
        fields = [field for field in descriptor.fields if field.name not in without]
        if request:
            needed = [field.name for field in fields if field.name in rules.required(descriptor)]
        else:
            needed = [field.name for field in fields if _always_there(field)]
        made: Schema = {"type": "object"}
        if text := self._comments.get(descriptor.full_name):
            made["description"] = text
        made["properties"] = {field.name: self.field(field, request=request) for field in fields}
        if request:
            optional = [name for name in made["properties"] if name not in needed]
            made["properties"] |= {name: _or_null(made["properties"][name]) for name in optional}
        if needed:
            made["required"] = needed
        if request:
            made["additionalProperties"] = False
        return made

    def field(self, field: FieldDescriptor, *, request: bool) -> Schema:
        """The schema of one field with its description."""
        own = rules.of_field(field)
        made: Schema
        if names.is_map(field):
            value = field.message_type.fields_by_name["value"]
            made = {"type": "object", "additionalProperties": self._value(value, own.map.values, request=request)}
            made |= _key_schema(field.message_type.fields_by_name["key"]) | rules.mapping(own)
        elif field.is_repeated:
            made = {"type": "array", "items": self._value(field, own.repeated.items, request=request)}
            made |= rules.repeated(own)
        else:
            made = self._value(field, own, request=request)
        if text := self._comments.get(field.full_name):
            made["description"] = text
        if "OUTPUT_ONLY" in rules.behaviors(field):
            made["readOnly"] = True
        return made

    def _value(self, field: FieldDescriptor, own: Any, *, request: bool) -> Schema:
        if field.message_type is not None:
            return self.message(field.message_type, request=request)
        if field.enum_type is not None:
            return {"type": "string", "enum": rules.words(field.enum_type, own) if request else self._all(field)}
        if field.type == FieldDescriptor.TYPE_BYTES:
            return dict(_BASE64)
        made = dict(_SCALARS[field.cpp_type])
        return made | rules.scalar(own) if request else made

    @staticmethod
    def _all(field: FieldDescriptor) -> list[str]:
        return list(names.words(field.enum_type).values()) if field.is_repeated else names.accepted(field.enum_type)


def _or_null(schema: Schema) -> Schema:
    """The schema of a field that may be left out: `null` says the same."""
    if "$ref" in schema:
        around = {name: value for name, value in schema.items() if name != "$ref"}
        return {"anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}], **around}
    if "type" not in schema:
        return schema
    made = schema | {"type": [schema["type"], "null"]}
    return made | {"enum": [*schema["enum"], None]} if "enum" in schema else made


def _key_schema(key: FieldDescriptor) -> Schema:
    pattern = _KEYS.get(key.cpp_type)
    return {"propertyNames": {"pattern": pattern}} if pattern else {}


def _always_there(field: FieldDescriptor) -> bool:
    if field.has_presence:
        return False
    return (
        field.is_repeated or field.enum_type is None or not field.enum_type.values[0].name.endswith(names.UNSPECIFIED)
    )
