"""protovalidate rules and field behaviour of a proto field, as JSON Schema keywords."""

from __future__ import annotations

from functools import cache
from typing import Any

import protovalidate
from buf.validate import validate_pb2
from google.api import field_behavior_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway import names

_BOUNDS = {"gt": "exclusiveMinimum", "gte": "minimum", "lt": "exclusiveMaximum", "lte": "maximum"}
_STRING = {"min_len": "minLength", "max_len": "maxLength", "pattern": "pattern"}
_REPEATED = {"min_items": "minItems", "max_items": "maxItems", "unique": "uniqueItems"}
_MAP = {"min_pairs": "minProperties", "max_pairs": "maxProperties"}
_FORMATS = {"email": "email", "uuid": "uuid", "uri": "uri", "hostname": "hostname"}


def of_field(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """The field's rules; empty ones when it has none."""
    return field.GetOptions().Extensions[validate_pb2.field]


def behaviors(field: FieldDescriptor) -> set[str]:
    """Names such as REQUIRED and OUTPUT_ONLY."""
    found = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return {field_behavior_pb2.FieldBehavior.Name(one) for one in found}


@cache
def required(message: Descriptor) -> frozenset[str]:
    """The fields that a request must hold: said to be, or refused by their rules when they are left out."""
    said = {field.name for field in message.fields if "REQUIRED" in behaviors(field)}
    empty = message_factory.GetMessageClass(message)()
    paths = [violation.proto.field for violation in protovalidate.Validator().collect_violations(empty)]
    violated = {path.elements[0].field_name for path in paths if path is not None and path.elements}
    return frozenset(said | violated)


def scalar(rules: validate_pb2.FieldRules) -> dict[str, Any]:
    """Keywords for one value."""
    kind = rules.WhichOneof("type")
    if kind in (None, "repeated", "map", "enum", "any", "bool", "duration", "timestamp", "field_mask"):
        return {}
    own = getattr(rules, kind)
    if kind == "bytes":
        return {}  # lengths count bytes, JSON Schema's count base64 characters
    made: dict[str, Any] = {}
    for name, keyword in (_STRING if kind == "string" else _BOUNDS).items():
        if own.HasField(name):
            made[keyword] = getattr(own, name)
    if kind == "string" and own.HasField("len"):
        made |= {"minLength": own.len, "maxLength": own.len}
    if kind == "string" and own.WhichOneof("well_known") in _FORMATS:
        made["format"] = _FORMATS[own.WhichOneof("well_known")]
    listed = list(getattr(own, "in"))
    if listed:
        made["enum"] = listed
    if own.HasField("const"):
        made["const"] = own.const
    return made


def words(enum: EnumDescriptor, rules: validate_pb2.FieldRules) -> list[str]:
    """The words of an enum that the rules allow."""
    by_number = names.words(enum)
    allowed, refused = list(getattr(rules.enum, "in")), set(rules.enum.not_in)
    return [
        word
        for number, word in by_number.items()
        if word in names.accepted(enum) and number not in refused and (not allowed or number in allowed)
    ]


def repeated(rules: validate_pb2.FieldRules) -> dict[str, Any]:
    """Keywords for a list."""
    own = rules.repeated
    return {keyword: getattr(own, name) for name, keyword in _REPEATED.items() if own.HasField(name)}


def mapping(rules: validate_pb2.FieldRules) -> dict[str, Any]:
    """Keywords for a map."""
    own = rules.map
    return {keyword: getattr(own, name) for name, keyword in _MAP.items() if own.HasField(name)}
