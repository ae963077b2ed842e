"""Comments of the protos, from the descriptor set with source info that ships with the stubs."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping

from google.protobuf import descriptor_pb2

_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD, _NESTED, _NESTED_ENUM, _VALUE, _METHOD = 2, 3, 4, 2, 2
Comments = Mapping[str, str]
"""Full name of a message, field, enum, value, service or method -> what its proto says about it."""


def load() -> Comments:
    """The comments of the installed stubs."""
    packed = importlib.resources.files("lensmesh").joinpath("descriptors.binpb").read_bytes()
    return read(descriptor_pb2.FileDescriptorSet.FromString(packed))


def read(files: descriptor_pb2.FileDescriptorSet) -> Comments:
    """The comments of a descriptor set that was made with source info."""
    found: dict[str, str] = {}
    for file in files.file:
        names = dict(_names(file))
        for location in file.source_code_info.location:
            name, text = names.get(tuple(location.path)), location.leading_comments.strip()
            if name and text:
                found[name] = " ".join(line.strip() for line in text.splitlines())
    return found


def _names(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """(source info path, full name) of everything that can carry a comment."""
    for index, message in enumerate(file.message_type):
        yield from _in_message(message, (_MESSAGE, index), file.package)
    for index, enum in enumerate(file.enum_type):
        yield from _in_enum(enum, (_ENUM, index), file.package)
    for index, service in enumerate(file.service):
        full = f"{file.package}.{service.name}"
        yield (_SERVICE, index), full
        for inner, method in enumerate(service.method):
            yield (_SERVICE, index, _METHOD, inner), f"{full}.{method.name}"


def _in_message(
    message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], scope: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    full = f"{scope}.{message.name}"
    yield path, full
    for index, field in enumerate(message.field):
        yield (*path, _FIELD, index), f"{full}.{field.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _in_message(nested, (*path, _NESTED, index), full)
    for index, enum in enumerate(message.enum_type):
        yield from _in_enum(enum, (*path, _NESTED_ENUM, index), full)


def _in_enum(
    enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...], scope: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    full = f"{scope}.{enum.name}"
    yield path, full
    for index, value in enumerate(enum.value):
        yield (*path, _VALUE, index), f"{full}.{value.name}"
