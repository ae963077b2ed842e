"""The routing table, built from the stubs' annotations and refused as a whole when one method's are not safe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.message import Message

from gateway import names, query, stubs, template
from gateway.stubs import Binding, Method
from gateway.template import Template

WEBSOCKET_PATH = "/api/events"
VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_UNSUPPORTED = ("google.protobuf.Any",)


@dataclass(frozen=True)
class Route:
    """One binding of one method."""

    method: Method
    binding: Binding
    template: Template

    @cached_property
    def request_class(self) -> type[Message]:
        """Class of the request message."""
        return stubs.message_class(self.method.descriptor.input_type)

    @cached_property
    def response_class(self) -> type[Message]:
        """Class of the response message, or of one message of the stream."""
        return stubs.message_class(self.method.descriptor.output_type)

    @property
    def streams(self) -> bool:
        """The service answers with a stream."""
        return bool(self.method.descriptor.server_streaming)

    @property
    def raw(self) -> bool:
        """The answer is bytes of a content type of its own (`google.api.HttpBody`)."""
        return bool(self.method.descriptor.output_type.full_name == stubs.HTTP_BODY)

    @property
    def public(self) -> bool:
        """No token is needed."""
        return bool(self.method.policy is not None and self.method.policy.public)


@dataclass(frozen=True)
class Match:
    """A route and the path variables of one request."""

    route: Route
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """All routes; `find` is the only way in."""

    routes: tuple[Route, ...]
    websocket: Route | None
    """The stream behind the WebSocket at `WEBSOCKET_PATH`."""

    def find(self, verb: str, raw_path: str) -> Match | None:
        """The route that takes this verb and this percent-encoded path.

        Raises:
            UnicodeDecodeError: the path is not UTF-8.
        """
        segments = raw_path.split("/")[1:]
        for route in self.routes:
            if route.binding.verb == verb and (variables := route.template.match(segments)) is not None:
                return Match(route, variables)
        return None

    def verbs(self, raw_path: str) -> list[str]:
        """HTTP verbs under which the path exists."""
        return [verb for verb in VERBS if self.find(verb, raw_path)]


class UnsafeRoutes(ValueError):
    """Annotations from which no safe table can be made; every problem on a line of its own."""


def build(files: Iterable[FileDescriptor]) -> Table:
    """The table of all methods with an HTTP binding.

    Raises:
        UnsafeRoutes: `check` found something.
    """
    found = list(stubs.methods(files))
    problems = list(_problems(found))
    if problems:
        raise UnsafeRoutes("\n".join(problems))
    routes = [_route(method, binding) for method in found for binding in method.bindings]
    routes.sort(key=lambda route: route.template.precedence)
    live = [_route(method, Binding("GET", WEBSOCKET_PATH, "*", "")) for method in found if _feeds_websocket(method)]
    return Table(tuple(routes), live[0] if live else None)


def check(files: Iterable[FileDescriptor]) -> list[str]:
    """What is wrong with the annotations, for example a binding without a policy or two methods on one path."""
    return list(_problems(list(stubs.methods(files))))


def _route(method: Method, binding: Binding) -> Route:
    return Route(method, binding, template.parse(binding.template))


def _feeds_websocket(method: Method) -> bool:
    return method.policy is not None and method.policy.websocket


def _problems(methods: list[Method]) -> Iterator[str]:
    live = [method.name for method in methods if _feeds_websocket(method)]
    if len(live) > 1:
        yield f"{live[1]}: {WEBSOCKET_PATH} is fed by {live[0]} already"
    taken: dict[object, str] = {}
    for method in methods:
        yield from (f"{method.name}: {problem}" for problem in _of_policy(method))
        for binding in method.bindings:
            try:
                parsed = template.parse(binding.template)
            except ValueError as error:
                yield f"{method.name}: {error}"
                continue
            yield from (f"{method.name}: {problem}" for problem in _of_binding(method, binding, parsed))
            owner = taken.setdefault((binding.verb, parsed.shape), method.name)
            if owner != method.name:
                yield f"{method.name}: {binding.verb} {binding.template} belongs to {owner} already"


def _of_policy(method: Method) -> Iterator[str]:
    policy, descriptor = method.policy, method.descriptor
    if policy is None:
        if method.bindings:
            yield "has an HTTP binding and no (lensmesh.http.v1.policy)"
        return
    if method.bindings and policy.internal:
        yield "is internal and must not have an HTTP binding"
    if method.bindings and not policy.scopes and not policy.public:
        yield "names no scope and is not public"
    if policy.public and policy.scopes:
        yield "is public and names scopes"
    if policy.success_status and not 200 <= policy.success_status < 300:
        yield f"success_status {policy.success_status} is not a success"
    if policy.websocket and (not descriptor.server_streaming or policy.internal or policy.public):
        yield "a websocket method is a server stream for users with a token"
    if method.bindings and descriptor.client_streaming:
        yield "a client stream cannot be offered over HTTP"


def _of_binding(method: Method, binding: Binding, parsed: Template) -> Iterator[str]:
    request, response = method.descriptor.input_type, method.descriptor.output_type
    if binding.verb not in VERBS:
        yield f"{binding.verb or 'no verb'} is not one of {', '.join(VERBS)}"
    if binding.verb in ("GET", "DELETE") and binding.body:
        yield f"{binding.verb} {binding.template} must not have a body"
    for variable in parsed.variables:
        steps = query.resolve(request, variable.field)
        if steps is None or steps[-1].is_repeated or not query.is_leaf(steps[-1]):
            yield f"{{{variable.field}}} is not a field of {request.full_name} that a path can hold"
    body = request.fields_by_name.get(binding.body)
    if binding.body not in ("", "*") and (body is None or body.message_type is None or names.is_map(body)):
        yield f"body {binding.body!r} is not a message field of {request.full_name}"
    if binding.response_body and binding.response_body not in response.fields_by_name:
        yield f"response_body {binding.response_body!r} is not a field of {response.full_name}"
    for message in (request, response):
        if message.full_name != stubs.HTTP_BODY:
            yield from (f"{name} has no JSON form here" for name in _reachable(message) if name in _UNSUPPORTED)


def _reachable(message: Descriptor) -> set[str]:
    seen: dict[str, Descriptor] = {}
    waiting = [message]
    while waiting:
        current = waiting.pop()
        if current.full_name not in seen and current.full_name != stubs.HTTP_BODY:
            seen[current.full_name] = current
            waiting += [one.message_type for one in current.fields if one.message_type is not None]
    return set(seen)
