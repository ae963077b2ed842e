"""Read masks: a reply holds only what the `read_mask` of its request names, of each listed resource in a page."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from services.kit.errors import Invalid

M = TypeVar("M", bound=Message)


def check_mask(request: Message, reply: Descriptor) -> None:
    """Before the work is done.

    Raises:
        Invalid: the mask names a field that the resource does not have.
    """
    mask = _mask(request)
    if mask is None:
        return
    listed = _listed(reply)
    resource = reply if listed is None else listed.message_type
    if not mask.IsValidForDescriptor(resource):
        raise Invalid.of("read_mask", f"names a field that {resource.name} does not have")


def masked(request: Message, reply: M) -> M:
    """The reply as it was asked for; whole without a mask."""
    mask = _mask(request)
    if mask is None:
        return reply
    listed = _listed(reply.DESCRIPTOR)
    if listed is None:
        return _only(reply, mask)
    chosen = [_only(each, mask) for each in getattr(reply, listed.name)]
    reply.ClearField(listed.name)
    getattr(reply, listed.name).extend(chosen)
    return reply


def _mask(request: Message) -> FieldMask | None:
    if "read_mask" not in request.DESCRIPTOR.fields_by_name:
        return None
    mask: FieldMask = request.read_mask
    return mask if mask.paths else None


def _listed(reply: Descriptor) -> FieldDescriptor | None:
    """The list of a page: its first field, as in the gateway."""
    first = reply.fields[0] if reply.fields else None
    return first if first is not None and first.is_repeated and first.message_type is not None else None


def _only(message: M, mask: FieldMask) -> M:
    chosen = type(message)()
    mask.MergeMessage(message, chosen)
    return chosen
