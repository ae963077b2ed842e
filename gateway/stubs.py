"""The generated stubs as the gateway sees them: files, methods, bindings, policies, message classes."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.api import annotations_pb2, http_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from lensmesh.http.v1 import http_pb2 as policy_pb2

HTTP_BODY = "google.api.HttpBody"


@dataclass(frozen=True, slots=True)
class Binding:
    """One (HTTP verb, path template) of a method."""

    verb: str
    template: str
    body: str
    """`*`, the name of a request field, or empty: the request has no body."""
    response_body: str


@dataclass(frozen=True)
class Method:
    """One rpc with what its options say about HTTP."""

    descriptor: MethodDescriptor
    bindings: tuple[Binding, ...]
    policy: policy_pb2.Policy | None

    @property
    def name(self) -> str:
        """Full name, `lensmesh.registry.v1.ModelService.GetModel`."""
        return f"{self.descriptor.containing_service.full_name}.{self.descriptor.name}"

    @property
    def package(self) -> str:
        """Proto package, the key of its backend's address."""
        return str(self.descriptor.containing_service.file.package)

    @property
    def service(self) -> str:
        """Full name of its service."""
        return str(self.descriptor.containing_service.full_name)

    @property
    def call_path(self) -> str:
        """Path of the rpc, `/lensmesh.registry.v1.ModelService/GetModel`."""
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"


def message_class(descriptor: Descriptor) -> type[Message]:
    """The Python class of a message."""
    return message_factory.GetMessageClass(descriptor)


def load(packages: Iterable[str]) -> list[FileDescriptor]:
    """Import every stub module of each proto package and return their files.

    A proto package is a Python package of the same name, since in Lensmesh the directory is the package.

    Raises:
        ValueError: a package has no stubs here.
    """
    files = []
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        places = found.submodule_search_locations if found is not None else None
        names = sorted(name for _, name, _ in pkgutil.iter_modules(places or []) if name.endswith("_pb2"))
        if not names:
            raise ValueError(f"no stubs are installed for the proto package {package!r}")
        files += [importlib.import_module(f"{package}.{name}").DESCRIPTOR for name in names]
    return files


def methods(files: Iterable[FileDescriptor]) -> Iterator[Method]:
    """Every rpc of the files, in the order in which the protos write them."""
    for file in files:
        for service in file.services_by_name.values():
            for descriptor in service.methods:
                options = descriptor.GetOptions()
                rule = options.Extensions[annotations_pb2.http]
                bound = options.HasExtension(annotations_pb2.http)
                has_policy = options.HasExtension(policy_pb2.policy)
                yield Method(
                    descriptor,
                    tuple(_binding(one) for one in (rule, *rule.additional_bindings)) if bound else (),
                    options.Extensions[policy_pb2.policy] if has_policy else None,
                )


def _binding(rule: http_pb2.HttpRule) -> Binding:
    pattern = rule.WhichOneof("pattern") or ""
    if pattern == "custom":
        return Binding(rule.custom.kind, rule.custom.path, rule.body, rule.response_body)
    return Binding(pattern.upper(), getattr(rule, pattern) if pattern else "", rule.body, rule.response_body)
