"""The mesh's own protos: safe to serve, and with every route that the HTTP contract names so far."""

from __future__ import annotations

import pytest

from gateway import comments, openapi, routes, stubs

AREAS = ("common", "events", "http", "registry", "residency", "extraction", "training", "extensions")
ROUTES = """
POST /api/models · GET /api/models · GET /api/models/m · PATCH /api/models/m · DELETE /api/models/m
POST /api/models/m/load · POST /api/models/m/unload · POST /api/models/m/move · POST /api/models/m/estimate
POST /api/models/m/extract-activations · GET /api/models/m/activations/e · POST /api/models/m/generate
GET /api/extractions · GET /api/extractions/e · DELETE /api/extractions/e · POST /api/extractions/e/cancel
GET /api/activation-caches · GET /api/activation-caches/c · DELETE /api/activation-caches/c
POST /api/activation-caches/c/verify · GET /api/activation-caches/c/shards/0
POST /api/datasets · GET /api/datasets · GET /api/datasets/d · DELETE /api/datasets/d
POST /api/v2/groups · GET /api/v2/groups · GET /api/v2/groups/g · DELETE /api/v2/groups/g · GET /api/v2/groups/g/status
POST /api/v2/groups/g/lenses · DELETE /api/v2/groups/g/lenses/l · POST /api/v2/groups/g/switch
POST /api/v2/groups/g/preload · POST /api/v2/groups/g/move · POST /api/v2/groups/g/analyze
POST /api/training-jobs · GET /api/training-jobs · GET /api/training-jobs/j · GET /api/training-jobs/j/metrics
POST /api/training-jobs/j/cancel · POST /api/training-jobs/j/pause · POST /api/training-jobs/j/resume
POST /api/training-jobs/j/finalize · POST /api/training-jobs/j/checkpoints/prune · POST /api/training-jobs/j/clone
GET /api/training-jobs/j/config · GET /api/transcoders · GET /api/transcoders/t · DELETE /api/transcoders/t
POST /api/transcoders/t/export · POST /api/transcoders/import · POST /api/transcoders/compare
GET /api/transcoders/t/features/3 · GET /api/training-jobs/j/plots/fvu
GET /api/transcoders/t/plots/density · GET /api/transcoder-exports/d/files/f · GET /api/evaluations
POST /api/transcoders/t/evaluate · GET /api/transcoders/t/evaluations · POST /api/transcoders/t/encode
POST /api/extensions · GET /api/extensions · GET /api/extensions/x · DELETE /api/extensions/x
POST /api/extensions/x/train · POST /api/extensions/x/activate · POST /api/extensions/x/deactivate
POST /api/extensions/x/generate · GET /api/devices · POST /api/devices/host/cuda:0/clear
GET /api/jobs · GET /api/jobs/j · POST /api/jobs/j/cancel · POST /api/jobs/j/retry · GET /api/jobs/j/events
"""


@pytest.fixture(scope="module")
def table() -> routes.Table:
    return routes.build(stubs.load(f"lensmesh.{area}.v1" for area in AREAS))


def test_no_method_is_unsafe() -> None:
    assert routes.check(stubs.load(f"lensmesh.{area}.v1" for area in AREAS)) == []


@pytest.mark.parametrize("wanted", [one.strip() for line in ROUTES.strip().splitlines() for one in line.split("·")])
def test_a_route_of_the_contract_exists(table: routes.Table, wanted: str) -> None:
    verb, path = wanted.split()
    assert table.find(verb, path) is not None


def test_reads_need_read_and_writes_need_more(table: routes.Table) -> None:
    for route in table.routes:
        policy = route.method.policy
        assert policy is not None
        if route.binding.verb == "GET":
            assert list(policy.scopes) == ["model:read"], route.method.name
        assert set(policy.scopes) <= {"model:read", "model:write", "model:admin"}, route.method.name


def test_the_websocket_has_its_feed(table: routes.Table) -> None:
    assert table.websocket is not None
    assert table.websocket.method.name == "lensmesh.registry.v1.EventService.Watch"


def test_every_operation_is_described(table: routes.Table) -> None:
    made = openapi.document(table, comments.load())
    operations = [one for item in made["paths"].values() for one in item.values()]
    assert len(operations) == len(table.routes)
    for operation in operations:
        assert operation["description"], operation["operationId"]
        assert all(one.get("description") for one in operation["parameters"]), operation["operationId"]
