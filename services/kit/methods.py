"""What the descriptors say about every method this process serves or calls: its policy and its idempotency."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from lensmesh.http.v1 import http_pb2

_LEVELS = descriptor_pb2.MethodOptions


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc."""

    path: str
    """`/package.Service/Method`."""
    service: str
    name: str
    policy: http_pb2.Policy
    streams: bool
    """Whether it answers with a stream."""
    idempotent: bool
    """Whether a lost call may simply be made again."""
    writes: bool
    """Whether a user's call changes something, so that it is audited."""
    reply: Descriptor
    """What it answers, of a stream each message."""


def methods_of(service_name: str) -> list[Method]:
    """The methods of a service whose stubs are imported.

    Raises:
        ValueError: a method has no policy; every method must say who may call it.
    """
    service: ServiceDescriptor = descriptor_pool.Default().FindServiceByName(service_name)
    found = []
    for method in service.methods:
        options = method.GetOptions()
        if not options.HasExtension(http_pb2.policy):
            raise ValueError(f"{method.full_name} has no (lensmesh.http.v1.policy)")
        policy = options.Extensions[http_pb2.policy]
        level = options.idempotency_level
        found.append(
            Method(
                path=f"/{service.full_name}/{method.name}",
                service=service.full_name,
                name=method.name,
                policy=policy,
                streams=method.server_streaming,
                idempotent=level in (_LEVELS.NO_SIDE_EFFECTS, _LEVELS.IDEMPOTENT),
                writes=not policy.internal and level != _LEVELS.NO_SIDE_EFFECTS,
                reply=method.output_type,
            )
        )
    return found
