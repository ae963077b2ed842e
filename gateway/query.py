"""Path variables and query parameters -> request fields, nested (`a.b`) and repeated ones included."""

from __future__ import annotations

from urllib.parse import parse_qsl

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from gateway import names
from gateway.decode import WELL_KNOWN, Wrong, decode, from_text, refuse, scalar
from services.kit.errors import Invalid

_STRUCTURED = ("google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue")
MAX_PARAMETERS = 200
"""Most query parameters of one request."""


def resolve(descriptor: Descriptor, path: str) -> list[FieldDescriptor] | None:
    """The fields along `a.b.c`, or None where a name is unknown or leads through a list, a map or a scalar."""
    steps: list[FieldDescriptor] = []
    current: Descriptor | None = descriptor
    for name in path.split("."):
        field = current.fields_by_name.get(name) if current is not None else None
        if field is None or (steps and steps[-1].is_repeated):
            return None
        steps.append(field)
        current = field.message_type
        if current is not None and current.full_name in WELL_KNOWN:
            current = None
    return steps


def is_leaf(field: FieldDescriptor) -> bool:
    """Whether one piece of text can be the field's value."""
    if field.message_type is None:
        return True
    return field.message_type.full_name in WELL_KNOWN and field.message_type.full_name not in _STRUCTURED


def put(message: Message, path: str, texts: list[str], wrong: Wrong) -> None:
    """Set the field at `path` from its texts (several only for a repeated field); what is wrong goes into `wrong`."""
    steps = resolve(message.DESCRIPTOR, path)
    if steps is None or not is_leaf(steps[-1]) or names.is_map(steps[-1]):
        wrong.append((path[:100], "is not a parameter of this request"))
        return
    target = message
    for step in steps[:-1]:
        target = getattr(target, step.name)
    field = steps[-1]
    if len(texts) > 1 and not field.is_repeated:
        wrong.append((path, "is given twice"))
        return
    try:
        if field.is_repeated:
            _extend(target, field, texts)
        elif field.message_type is not None:
            decode(getattr(target, field.name), texts[0], at=path)
        else:
            setattr(target, field.name, scalar(field, from_text(field, texts[0])))
    except ValueError as error:
        wrong.append((path, str(error)))
    except Invalid as error:
        wrong.extend(error.violations)


def _extend(target: Message, field: FieldDescriptor, texts: list[str]) -> None:
    values = getattr(target, field.name)
    for text in texts:
        if field.message_type is not None:
            decode(values.add(), text, at=field.name)
        else:
            values.append(scalar(field, from_text(field, text)))


def fill(message: Message, variables: dict[str, str], query: bytes, *, body: str) -> None:
    """Fill a request from its path and its query; the body has been decoded before, so that the path wins.

    Args:
        message: the request.
        variables: path variables, by field path.
        query: the raw query string.
        body: the binding's body: with `*` every other field stands in the body and the query must be empty.

    Raises:
        Invalid: a parameter is unknown, wrong, given twice, or contradicts the path.
    """
    wrong: Wrong = []
    grouped: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(
            query.decode("latin-1"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
        )
    except ValueError as error:  # not UTF-8, or more than MAX_PARAMETERS
        raise Invalid.of("query", f"is not UTF-8 or has more than {MAX_PARAMETERS} parameters") from error
    for name, text in pairs:
        grouped.setdefault(name, []).append(text)
    for name, texts in grouped.items():
        if body == "*" or (body and name.split(".")[0] == body):
            wrong.append((name[:100], "belongs into the body, not into the query"))
        elif name in variables:
            wrong.append((name, "stands in the path"))
        else:
            put(message, name, texts, wrong)
    for name, text in variables.items():
        _agree(message, name, text, wrong)
        put(message, name, [text], wrong)
    refuse(wrong)


def _agree(message: Message, path: str, text: str, wrong: Wrong) -> None:
    steps = resolve(message.DESCRIPTOR, path)
    assert steps is not None, "routes.check has resolved every path variable"
    target = message
    for step in steps[:-1]:
        target = getattr(target, step.name)
    given = getattr(target, steps[-1].name)
    if given and str(given) != text:
        wrong.append((path, "differs from the one in the path"))
