"""How proto names are written in JSON: enum values as lower-case words without their prefix."""

from __future__ import annotations

from functools import cache

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

UNSPECIFIED = "_UNSPECIFIED"


@cache
def words(enum: EnumDescriptor) -> dict[int, str]:
    """Number -> word: MODEL_STATUS_READY of `ModelStatus` is `ready`."""
    zero = enum.values[0].name
    prefix = zero.removesuffix(UNSPECIFIED) + "_" if zero.endswith(UNSPECIFIED) else ""
    return {value.number: value.name.removeprefix(prefix).lower() for value in enum.values}


@cache
def numbers(enum: EnumDescriptor) -> dict[str, int]:
    """Word -> number, the inverse of `words`."""
    return {word: number for number, word in words(enum).items()}


@cache
def accepted(enum: EnumDescriptor) -> list[str]:
    """The words a client may send, for messages and for OpenAPI; `unspecified` is said by leaving the field out."""
    unspecified = enum.values[0].name.endswith(UNSPECIFIED)
    return [word for number, word in words(enum).items() if number or not unspecified]


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field is a `map<…>`."""
    return bool(field.message_type and field.message_type.GetOptions().map_entry)
