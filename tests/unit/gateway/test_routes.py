from __future__ import annotations

import pytest

from gateway import routes, stubs
from tests.unit.gateway import zoo_stubs

FILES = [zoo_stubs.module("zoo.v1.zoo_pb2").DESCRIPTOR]


@pytest.fixture(scope="module")
def table() -> routes.Table:
    return routes.build(FILES)


@pytest.mark.parametrize(
    ("verb", "path", "method", "variables"),
    [
        ("POST", "/api/animals", "CreateAnimal", {}),
        ("GET", "/api/animals", "ListAnimals", {}),
        ("GET", "/api/animals/a%20b", "GetAnimal", {"id": "a b"}),
        ("GET", "/api/v2/animals/7", "GetAnimal", {"id": "animals/7"}),
        ("PATCH", "/api/animals/7", "UpdateAnimal", {"animal.id": "7"}),
        ("POST", "/api/animals/7:feed", "FeedAnimal", {"name": "7"}),
        ("POST", "/api/v2/groups/g/switch", "Switch", {"id": "g"}),
        ("GET", "/api/animals/7/events", "WatchAnimal", {"id": "7"}),
    ],
)
def test_find(table: routes.Table, verb: str, path: str, method: str, variables: dict[str, str]) -> None:
    found = table.find(verb, path)
    assert found is not None
    assert found.route.method.descriptor.name == method
    assert found.variables == variables


def test_what_is_not_bound_is_not_found(table: routes.Table) -> None:
    assert table.find("GET", "/api/secret") is None
    assert table.find("GET", "/api/animals/") is None
    assert table.find("PUT", "/api/animals/7") is None
    assert table.verbs("/api/animals/7") == ["GET", "PATCH", "DELETE"]
    assert table.verbs("/zoo.v1.ZooService/Secret") == []


def test_the_websocket_is_fed_by_the_method_that_says_so(table: routes.Table) -> None:
    assert table.websocket is not None
    assert table.websocket.method.name == "zoo.v1.ZooService.WatchAll"


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("NoPolicy", "has an HTTP binding and no (lensmesh.http.v1.policy)"),
        ("NoScope", "names no scope and is not public"),
        ("InternalRoute", "is internal and must not have an HTTP binding"),
        ("PublicScopes", "is public and names scopes"),
        ("NotASuccess", "success_status 404 is not a success"),
        ("UnknownVariable", "{name} is not a field of broken.v1.Reply that a path can hold"),
        ("RepeatedVariable", "{ids} is not a field of broken.v1.Request that a path can hold"),
        ("UnknownBody", "body 'id' is not a message field of broken.v1.Reply"),
        ("UnknownResponseBody", "response_body 'name' is not a field of broken.v1.Reply"),
        ("BodyOfGet", "GET /api/get must not have a body"),
        ("BadTemplate", "path template '/api//double': slashes and segments do not alternate"),
        ("BadVerb", "BREW is not one of GET, POST, PUT, PATCH, DELETE"),
        ("Second", "GET /api/same/{id=*} belongs to broken.v1.BrokenService.First already"),
        ("Second", "google.protobuf.Any has no JSON form here"),
        ("ClientStream", "a client stream cannot be offered over HTTP"),
        ("UnarySocket", "a websocket method is a server stream for users with a token"),
        ("OtherSocket", "/api/events is fed by broken.v1.BrokenService.UnarySocket already"),
    ],
)
def test_check_names_what_is_not_safe(method: str, problem: str) -> None:
    problems = routes.check([zoo_stubs.module("broken.v1.broken_pb2").DESCRIPTOR])
    assert f"broken.v1.BrokenService.{method}: {problem}" in problems


def test_one_unsafe_method_refuses_the_whole_table() -> None:
    assert routes.check(FILES) == []
    with pytest.raises(routes.UnsafeRoutes, match="NoPolicy"):
        routes.build([*FILES, zoo_stubs.module("broken.v1.broken_pb2").DESCRIPTOR])


def test_stubs_are_found_by_proto_package() -> None:
    (file,) = stubs.load(["zoo.v1"])
    assert file.package == "zoo.v1"
    for missing in ("nowhere.v1", "os"):
        with pytest.raises(ValueError, match="no stubs"):
            stubs.load([missing])
