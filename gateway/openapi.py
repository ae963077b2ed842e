"""The OpenAPI 3.1 document, from the same descriptors as the routes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from lensmesh.common.v1 import errors_pb2

from gateway import frames, names, query, rules
from gateway.comments import Comments
from gateway.routes import WEBSOCKET_PATH, Route, Table
from gateway.schema import Schema, Schemas
from gateway.stubs import HTTP_BODY
from gateway.template import REST, STAR, Template

_FAILURES = {
    400: "A field is wrong; `details.field_violations` names it.",
    401: "There is no token, or it is not valid.",
    403: "The token lacks a scope.",
    404: "The resource or the route does not exist.",
    405: "The path exists, the method does not.",
    408: "The body did not arrive in time.",
    409: "The resource's state or another client is in the way.",
    413: "The body is too large or nested too deeply.",
    415: "The body is not JSON.",
    429: "A limit is reached; see `Retry-After`.",
    500: "The work was tried and failed.",
    501: "This build or device cannot do it.",
    503: "A service does not answer; see `Retry-After`.",
    504: "The deadline passed.",
}
_ERROR = {"$ref": "#/components/schemas/Error"}
_HEADERS: dict[str, tuple[Schema, str]] = {
    "X-Request-Timeout": ({"type": "number", "exclusiveMinimum": 0}, "Deadline of the call in seconds."),
    "X-Request-Id": ({"type": "string"}, "Id of the request in logs and errors; replaced where it is not well formed."),
}


def document(table: Table, comments: Comments) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    schemas = Schemas(comments)
    paths: dict[str, dict[str, Any]] = {}
    first: dict[object, Template] = {}
    for route in table.routes:
        # One path, one set of names: another verb's variables are shown under the names of the first.
        shown = first.setdefault(_places(route.template), route.template)
        paths.setdefault(_path(shown), {})[route.binding.verb.lower()] = _operation(route, shown, schemas, comments)
    schemas.components["Error"] = _error()
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Lensmesh", "version": _version(), "description": "Derived from the protos."},
        "tags": list(_tags(table, comments)),
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "responses": {
                str(status): {"description": text, "content": _json(_ERROR)} for status, text in _FAILURES.items()
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }
    if table.websocket is not None:
        made["x-websocket"] = _websocket(table.websocket, schemas, comments)
    return made


def _operation(route: Route, shown: Template, schemas: Schemas, comments: Comments) -> dict[str, Any]:
    method, request = route.method, route.method.descriptor.input_type
    text = comments.get(method.name, "")
    bound = {variable.field for variable in route.template.variables}
    made: dict[str, Any] = {
        "operationId": _identity(route),
        "tags": [method.descriptor.containing_service.name],
        "summary": text.split(". ")[0].rstrip("."),
        "description": text,
        "parameters": [*_parameters(route, shown, schemas), *_header_parameters(request, raw=route.raw)],
    }
    if route.binding.body:
        made["requestBody"] = _request_body(route, schemas, bound)
    made["responses"] = _responses(route, schemas)
    if method.policy is not None and not route.public:
        made["security"] = [{"bearer": list(method.policy.scopes)}]
    if method.policy is not None and method.policy.rate_class:
        made["x-rate-class"] = method.policy.rate_class
    return made


def _request_body(route: Route, schemas: Schemas, bound: set[str]) -> dict[str, Any]:
    request = route.method.descriptor.input_type
    if route.binding.body == "*":
        schema = schemas.properties(request, request=True, without=bound)
        return {"required": bool(schema.get("required")), "content": _json(schema)}
    field = request.fields_by_name[route.binding.body]
    if field.message_type.full_name == HTTP_BODY:
        return {"required": True, "content": {"*/*": {}}}
    needed = field.name in rules.required(request) or bool(rules.required(field.message_type))
    return {"required": needed, "content": _json(schemas.field(field, request=True))}


def _parameters(route: Route, shown: Template, schemas: Schemas) -> Iterator[dict[str, Any]]:
    request = route.method.descriptor.input_type
    bound = {variable.field for variable in route.template.variables}
    for variable, first in zip(route.template.variables, shown.variables, strict=True):
        steps = query.resolve(request, variable.field) or []
        schema = schemas.field(steps[-1], request=True)
        if schema.get("type") == "string":
            schema.setdefault("minLength", 1)
        yield _parameter("path", first.field, schema, needed=True)
    if route.binding.body != "*":
        for name, field in _leaves(request, "", ()):
            if name not in bound and name.split(".")[0] != route.binding.body:
                needed = name in rules.required(request)
                yield _parameter("query", name, schemas.field(field, request=True), needed=needed)


def _leaves(message: Descriptor, at: str, above: tuple[str, ...]) -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        if names.is_map(field):
            continue
        if query.is_leaf(field):
            yield at + field.name, field
        elif not field.is_repeated and field.message_type.full_name not in above:
            yield from _leaves(field.message_type, f"{at}{field.name}.", (*above, message.full_name))


def _header_parameters(request: Descriptor, *, raw: bool) -> Iterator[dict[str, Any]]:
    for name, (schema, text) in _HEADERS.items():
        yield _parameter("header", name, schema | {"description": text}, needed=False)
    if "request_id" in request.fields_by_name:
        text = "The same as `request_id`."
        yield _parameter(
            "header", "Idempotency-Key", {"type": "string", "maxLength": 100, "description": text}, needed=False
        )
    if frames.AFTER_FIELD in request.fields_by_name:
        text = f"The same as `{frames.AFTER_FIELD}`."
        yield _parameter(
            "header", "Last-Event-ID", {"type": "integer", "minimum": 0, "description": text}, needed=False
        )
    if raw:
        text = "One range from a given byte, `bytes=0-99` or `bytes=100-`."
        yield _parameter("header", "Range", {"type": "string", "description": text}, needed=False)


def _parameter(place: str, name: str, schema: Schema, *, needed: bool) -> dict[str, Any]:
    made = {"name": name, "in": place, "required": needed, "schema": schema}
    if text := schema.pop("description", ""):
        made["description"] = text
    return made


def _responses(route: Route, schemas: Schemas) -> dict[str, Any]:
    status = (route.method.policy.success_status if route.method.policy else 0) or 200
    reply = route.method.descriptor.output_type
    made: dict[str, Any] = {}
    if status == 204:
        made["204"] = {"description": "Done; no body."}
    elif route.raw:
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        made[str(status)] = {"description": "The bytes.", "content": content}
        if route.streams:
            made["206"] = {"description": "The bytes of the wanted range.", "content": content}
            made["416"] = {"description": "The range lies behind the end.", "content": _json(_ERROR)}
    elif route.streams:
        one = schemas.message(reply, request=False)
        lines: Schema = {"type": "object", "properties": {"result": one, "error": {"type": "object"}}}
        content = {"text/event-stream": {"schema": {"type": "string"}}, "application/x-ndjson": {"schema": lines}}
        made[str(status)] = {"description": "Messages until the stream ends.", "content": content}
    else:
        if route.binding.response_body:
            schema = schemas.field(reply.fields_by_name[route.binding.response_body], request=False)
        else:
            schema = schemas.message(reply, request=False)
        made[str(status)] = {"description": "Done.", "content": _json(schema)}
        if "validate_only" in route.method.descriptor.input_type.fields_by_name and status != 200:
            made["200"] = {"description": "The plan, with `validate_only`.", "content": _json(schema)}
    return made | {str(status): {"$ref": f"#/components/responses/{status}"} for status in _FAILURES}


def _error() -> Schema:
    words = names.accepted(errors_pb2.ErrorReason.DESCRIPTOR)
    text = {"type": "string"}
    violation = {"type": "object", "properties": {"field": text, "description": text}}
    inner = {
        "code": {"type": "string", "enum": [word.upper() for word in words]},
        "message": text,
        "details": {"type": "object", "properties": {"field_violations": {"type": "array", "items": violation}}},
        "timestamp": {"type": "string", "format": "date-time"},
        "request_id": text,
    }
    error = {"type": "object", "properties": inner, "required": list(inner)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def _websocket(route: Route, schemas: Schemas, comments: Comments) -> dict[str, Any]:
    first = schemas.properties(route.method.descriptor.input_type, request=True)
    first["properties"] = {"token": {"type": "string"}, **first["properties"]}
    first["required"] = ["token", *first.get("required", [])]
    data = {"type": "object", "properties": {"sequence": {"type": "integer"}}}
    frame = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}}
    text = comments.get(route.method.name, "")
    return {"path": WEBSOCKET_PATH, "description": text, "first_message": first, "frame": frame}


def _tags(table: Table, comments: Comments) -> Iterator[dict[str, str]]:
    services = {route.method.descriptor.containing_service for route in table.routes}
    for service in sorted(services, key=lambda one: one.name):
        yield {"name": service.name, "description": comments.get(service.full_name, "")}


def _identity(route: Route) -> str:
    name = f"{route.method.descriptor.containing_service.name}_{route.method.descriptor.name}"
    position = route.method.bindings.index(route.binding)
    return f"{name}_{position + 1}" if position else name


def _places(template: Template) -> object:
    return template.shape, tuple((variable.start, variable.stop) for variable in template.variables)


def _path(template: Template) -> str:
    """The path with `{field}` where a client puts a value: `/v1/{name=models/*}` is `/v1/models/{name}`."""
    segments = list(template.segments)
    for variable in template.variables:
        for index in range(variable.start, variable.stop):
            if segments[index] in (STAR, REST):
                segments[index] = f"{{{variable.field}}}"
    return "/" + "/".join(segments) + (f":{template.verb}" if template.verb else "")


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _version() -> str:
    try:
        return version("lensmesh")
    except PackageNotFoundError:
        return "0"
