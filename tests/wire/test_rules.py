"""Every method of every service meets the same rules before its servicer runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from joserfc.jwk import KeySet, OctKey
from lensmesh.registry.v1 import devices_pb2, devices_pb2_grpc, models_pb2, models_pb2_grpc
from prometheus_client import CollectorRegistry

from services.kit import auth, errors
from services.kit.channels import open_channel
from services.kit.config import Settings
from services.kit.interceptors import CallInterceptor
from services.kit.methods import Method, methods_of
from services.kit.metrics import RpcMetrics

SERVICES = [
    *("lensmesh.registry.v1." + n for n in ("ModelService", "GroupService", "DatasetService", "DeviceService")),
    *("lensmesh.registry.v1." + n for n in ("PlacementService", "JobService", "EventService")),
    "lensmesh.residency.v1.ModelHostService",
    "lensmesh.extraction.v1.ExtractionService",
    "lensmesh.training.v1.TrainingService",
    "lensmesh.training.v1.TranscoderService",
    "lensmesh.extensions.v1.ExtensionService",
]
for _module in (
    *(f"registry.v1.{n}" for n in ("models", "groups", "datasets", "devices", "jobs")),
    *(
        "residency.v1.residency",
        "extraction.v1.extraction",
        "training.v1.training",
        "training.v1.transcoders",
        "extensions.v1.extensions",
    ),
):
    importlib.import_module(f"lensmesh.{_module}_pb2_grpc")
METHODS = [method for service in SERVICES for method in methods_of(service)]


class AnyMethod(grpc.GenericRpcHandler):
    """Answers every method with an empty reply, so that only the rules can refuse a call."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = next((m for m in METHODS if m.path == details.method), None)
        if method is None:
            return None
        descriptor = descriptor_pool.Default().FindMethodByName(f"{method.service}.{method.name}")
        request, reply = (message_factory.GetMessageClass(d) for d in (descriptor.input_type, descriptor.output_type))

        async def unary(_: Any, __: Any) -> Any:
            return reply()

        async def stream(_: Any, __: Any) -> AsyncIterator[Any]:
            yield reply()

        serializers = (request.FromString, reply.SerializeToString)
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(stream, *serializers)
        return grpc.unary_unary_rpc_method_handler(unary, *serializers)


class Failing(models_pb2_grpc.ModelServiceServicer):
    """Raises what the test puts here."""

    error: BaseException

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise self.error


@dataclass
class Mesh:
    address: str
    keys: Path
    settings: Settings
    failing: Failing
    metrics: CollectorRegistry
    audited: list[tuple[str, str, str, str]] = field(default_factory=list)

    def token(self, *permissions: str) -> str:
        return auth.mint(
            self.keys,
            subject="ada",
            permissions=list(permissions),
            issuer="lensmesh",
            audience="lensmesh",
            lifetime_seconds=60,
        )


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    settings = Settings(state_dir=tmp_path)
    settings.jwt_keys.parent.mkdir()
    settings.jwt_keys.write_text(json.dumps(KeySet([OctKey.generate_key(256)]).as_dict(private=True)))
    settings.service_token_path.write_text("t" * 40)
    verifier = auth.TokenVerifier(
        settings.jwt_keys, settings.service_token_path, issuer="lensmesh", audience="lensmesh"
    )
    metrics = CollectorRegistry()
    mesh = Mesh("", settings.jwt_keys, settings, Failing(), metrics)

    async def audit(caller: auth.Caller, method: str, resource: str, outcome: str) -> None:
        mesh.audited.append((caller.subject, method, resource, outcome))

    server = grpc.aio.server(interceptors=[CallInterceptor(METHODS, verifier, RpcMetrics(metrics, METHODS), audit)])
    models_pb2_grpc.add_ModelServiceServicer_to_server(mesh.failing, server)
    server.add_generic_rpc_handlers((AnyMethod(),))
    mesh.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield mesh
    await server.stop(None)


async def code_of(mesh: Mesh, method: Method, token: str | None) -> grpc.StatusCode:
    """The status of one call with a request that is valid enough to pass authentication."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        try:
            if method.streams:
                async for _ in channel.unary_stream(method.path)(b"", metadata=metadata):
                    pass
            else:
                await channel.unary_unary(method.path)(b"", metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_no_method_answers_without_a_token(mesh: Mesh) -> None:
    codes = {method.path: await code_of(mesh, method, None) for method in METHODS}
    assert len(codes) > 60
    assert {path for path, code in codes.items() if code is not grpc.StatusCode.UNAUTHENTICATED} == set()


async def test_a_users_token_opens_no_internal_method(mesh: Mesh) -> None:
    token = mesh.token("model:read", "model:write", "model:admin")
    internal = [m for m in METHODS if m.policy.internal]
    assert {m.service for m in internal} >= {
        "lensmesh.residency.v1.ModelHostService",
        "lensmesh.registry.v1.PlacementService",
    }
    codes = {m.path: await code_of(mesh, m, token) for m in internal}
    assert set(codes.values()) == {grpc.StatusCode.PERMISSION_DENIED}


async def test_a_read_token_writes_nothing(mesh: Mesh) -> None:
    token = mesh.token("model:read")
    for method in (m for m in METHODS if not m.policy.internal):
        refused = await code_of(mesh, method, token) is grpc.StatusCode.PERMISSION_DENIED
        assert refused == (list(method.policy.scopes) != ["model:read"]), method.path


async def test_the_mesh_itself_may_call_everything(mesh: Mesh) -> None:
    async with open_channel(mesh.address, mesh.settings) as channel:
        reply = await devices_pb2_grpc.PlacementServiceStub(channel).LocateModel(
            devices_pb2.LocateModelRequest(model_id="m_1")
        )
    assert reply == devices_pb2.ModelLocation()


async def failure(mesh: Mesh, request: Any, method: str = "ListModels", service: Any = None) -> grpc.aio.AioRpcError:
    metadata = (("authorization", f"Bearer {mesh.token('model:read', 'model:write')}"),)
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        stub = (service or models_pb2_grpc.ModelServiceStub)(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request, metadata=metadata)
    return caught.value


def details_of(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


async def test_wrong_fields_are_named_before_anything_runs(mesh: Mesh) -> None:
    error = await failure(mesh, models_pb2.ListModelsRequest(limit=501, offset=-1))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "VALIDATION_ERROR"
    violations = details_of(error, error_details_pb2.BadRequest).field_violations
    assert {v.field for v in violations} == {"limit", "offset"}


async def test_known_errors_keep_reason_numbers_and_retry(mesh: Mesh) -> None:
    mesh.failing.error = errors.Exhausted(
        "too large",
        reason="INSUFFICIENT_MEMORY",
        metadata={"required_memory_gb": 8.5, "available_memory_gb": 6.0},
        retry_after=2.5,
    )
    error = await failure(mesh, models_pb2.ListModelsRequest())
    info = details_of(error, error_details_pb2.ErrorInfo)
    assert (error.code(), info.reason, info.domain) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "INSUFFICIENT_MEMORY",
        "lensmesh",
    )
    assert dict(info.metadata) == {"required_memory_gb": "8.5", "available_memory_gb": "6.0"}
    assert details_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2500


async def test_an_unknown_error_tells_nothing_but_an_id(mesh: Mesh) -> None:
    mesh.failing.error = FileNotFoundError("/secret/path/model.bin")
    error = await failure(mesh, models_pb2.ListModelsRequest())
    info = details_of(error, error_details_pb2.ErrorInfo)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "") + str(info)
    assert info.metadata["error_id"] in (error.details() or "")


async def test_an_error_of_a_service_behind_passes_through_whole(mesh: Mesh) -> None:
    mesh.failing.error = errors.NotFound("no model m_1", reason="MODEL_NOT_FOUND")
    first = await failure(mesh, models_pb2.ListModelsRequest())
    mesh.failing.error = first
    second = await failure(mesh, models_pb2.ListModelsRequest())
    assert second.code() is grpc.StatusCode.NOT_FOUND
    assert second.details() == "no model m_1"
    assert details_of(second, error_details_pb2.ErrorInfo).reason == "MODEL_NOT_FOUND"


async def test_calls_are_counted_by_method_and_code(mesh: Mesh) -> None:
    mesh.failing.error = errors.NotFound()
    await failure(mesh, models_pb2.ListModelsRequest())
    labels = {"grpc_type": "unary", "grpc_service": "lensmesh.registry.v1.ModelService", "grpc_method": "ListModels"}
    assert mesh.metrics.get_sample_value("grpc_server_handled_total", labels | {"grpc_code": "NOT_FOUND"}) == 1
    assert mesh.metrics.get_sample_value("grpc_server_handling_seconds_count", labels) == 1
    untouched = labels | {"grpc_method": "GetModel", "grpc_code": "OK"}
    assert mesh.metrics.get_sample_value("grpc_server_handled_total", untouched) == 0


async def test_a_users_writes_are_audited_and_reads_are_not(mesh: Mesh) -> None:
    mesh.failing.error = errors.NotFound()
    await failure(mesh, models_pb2.ListModelsRequest())
    metadata = (("authorization", f"Bearer {mesh.token('model:write')}"),)
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        switch = channel.unary_unary("/lensmesh.registry.v1.GroupService/SwitchLens")
        from lensmesh.registry.v1 import groups_pb2

        await switch(groups_pb2.SwitchLensRequest(id="grp_1").SerializeToString(), metadata=metadata)
    assert mesh.audited == [("ada", "/lensmesh.registry.v1.GroupService/SwitchLens", "grp_1", "OK")]


def test_a_method_without_a_policy_is_refused_at_start() -> None:
    importlib.import_module("grpc_health.v1.health_pb2")
    with pytest.raises(ValueError, match="has no"):
        methods_of("grpc.health.v1.Health")
