"""A real grpc.aio service under the kit's rules, and a real gateway process's listener in front of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.api import httpbody_pb2
from google.protobuf import struct_pb2
from grpc_health.v1 import health_pb2_grpc
from lensmesh.events.v1 import events_pb2
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import ClientConnection, connect

from gateway import comments, stubs
from gateway.__main__ import Server
from gateway.app import Gateway
from gateway.config import GatewaySettings
from gateway.listener import listen, server_config
from services.kit import auth, errors
from services.kit.channels import SERVER_OPTIONS
from services.kit.health import Health
from services.kit.interceptors import CallInterceptor
from services.kit.methods import methods_of
from services.kit.metrics import RpcMetrics
from tests.unit.gateway import zoo_stubs

pb = zoo_stubs.module("zoo.v1.zoo_pb2")
pb_grpc = zoo_stubs.module("zoo.v1.zoo_pb2_grpc")
CONTENT = bytes(range(256)) * 400
ALL_SCOPES = ["model:read", "model:write", "model:admin"]


def event(sequence: int, name: str = "animal:moved", **data: Any) -> events_pb2.Event:
    made = struct_pb2.Struct()
    made.update(data)
    return events_pb2.Event(event=name, resource_id="a_1", sequence=sequence, data=made)


@dataclass
class Zoo:
    """What the service does, and what it saw."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    """Metadata of every call."""
    requests: list[Any] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """A call that hangs was cancelled."""
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    """A call hangs now."""
    events: list[Any] = field(default_factory=list)
    """What WatchAll sends; then it hangs until cancelled."""
    tells_total: bool = True
    sent: int = 0
    """Messages that streams have handed to gRPC."""

    def note(self, request: Any, context: Any) -> None:
        self.seen.append(dict(context.invocation_metadata()))
        self.requests.append(request)

    async def hang(self) -> None:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def CreateAnimal(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        made = pb.Animal(id="a_1", name=request.name, kind=request.kind, grams=request.grams, notes=request.notes)
        made.born_at.FromJsonString("2025-10-06T10:00:00Z")
        return made

    async def GetAnimal(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        if request.id == "none":
            raise errors.NotFound("there is no such animal", reason="MODEL_NOT_FOUND", metadata={"id": request.id})
        return pb.Animal(id=request.id, name="tom", kind=pb.KIND_CAT, notes={"colour": "x" * 2000})

    async def ListAnimals(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        animals = [pb.Animal(id=f"a_{n}", name="tom", grams=2**53 + 1) for n in range(request.limit)]
        return pb.ListAnimalsResponse(animals=animals, total=len(animals), asked=request)

    async def UpdateAnimal(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        return request.animal

    async def DeleteAnimal(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        return pb.google_dot_protobuf_dot_empty__pb2.Empty()

    async def FeedAnimal(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        return pb.Animal(name=request.name)

    async def Switch(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        if request.lens_id == "far":
            context.set_trailing_metadata((("x-http-status", "202"),))
            return pb.SwitchResponse(id=request.id, job_id="job_1")
        return pb.SwitchResponse(id=request.id, lens_id=request.lens_id if request.HasField("lens_id") else None)

    async def Clear(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        return pb.Animal(name=request.name)

    async def ListNames(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        return pb.NamesResponse(names=["tom", "jerry"])

    async def Echo(self, request: Any, context: Any) -> Any:
        return request

    async def Fail(self, request: Any, context: Any) -> Any:
        kind, _, reason = request.kind.partition(".")
        if kind == "plain":
            await context.abort(getattr(grpc.StatusCode, reason), "at 10.0.0.1:50051 /work/secret")
        if kind == "crash":
            raise RuntimeError("secret at /work/secret")
        cls = getattr(errors, kind)
        if kind == "Invalid":
            raise errors.Invalid.of("name", "is wrong")
        wait = 7.0 if "wait" in request.metadata else None
        raise cls("it failed", reason=reason or None, metadata=dict(request.metadata), retry_after=wait)

    async def Hang(self, request: Any, context: Any) -> Any:
        self.note(request, context)
        await self.hang()

    async def GetPicture(self, request: Any, context: Any) -> Any:
        return httpbody_pb2.HttpBody(content_type="image/png", data=b"\x89PNG" * 1000)

    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.note(request, context)
        if request.name == "none":
            raise errors.NotFound()
        if request.name == "large":
            for _ in range(10_000):
                self.sent += 1
                yield httpbody_pb2.HttpBody(data=bytes(100_000))
            return
        if self.tells_total:
            await context.send_initial_metadata((("x-total-size", str(len(CONTENT))), ("etag", '"abc"')))
        stop = request.offset + request.length if request.length else len(CONTENT)
        for start in range(request.offset, min(stop, len(CONTENT)), 30_000):
            piece = CONTENT[start : min(start + 30_000, stop)]
            yield httpbody_pb2.HttpBody(content_type="application/x-safetensors", data=piece)

    async def Upload(self, request: Any, context: Any) -> Any:
        content = request.content
        return pb.UploadResponse(
            name=request.name, content_type=content.content_type, data=content.data, note=request.note
        )

    async def WatchAnimal(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.note(request, context)
        if request.id == "none":
            raise errors.NotFound()
        if request.id == "known":
            yield event(0, "animal:snapshot", colour="red")
        for sequence in range(request.after_sequence + 1, request.after_sequence + request.count + 1):
            yield event(sequence, progress=50.0 + sequence, message="line\nline")
        yield event(0, "heartbeat")
        if request.id == "broken":
            raise errors.Unavailable("the log is gone")
        if request.id == "endless":
            await self.hang()

    async def Count(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for number in range(1, request.to + 1):
            self.sent += 1
            yield pb.Number(number=number)
        if request.fail:
            raise errors.Failed("no more numbers", reason="EXTRACTION_FAILED")

    async def WatchAll(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.note(request, context)
        for one in self.events:
            self.sent += 1
            yield one
        await self.hang()

    async def Secret(self, request: Any, context: Any) -> Any:
        return pb.Animal(name="secret")


class _TestServer(Server):
    """The gateway's server, in a loop that has its own signal handlers."""

    def capture_signals(self) -> Any:
        return nullcontext()


@dataclass
class Mesh:
    """The running pair."""

    zoo: Zoo
    gateway: Gateway
    metrics: CollectorRegistry
    backend: grpc.aio.Server
    health: Health
    settings: GatewaySettings
    address: str
    http: httpx.AsyncClient

    def token(self, permissions: list[str] | None = None, **claims: Any) -> str:
        settings = self.settings
        wanted = {"subject": "ann", "permissions": ALL_SCOPES if permissions is None else permissions}
        wanted |= {"issuer": settings.jwt_issuer, "audience": settings.jwt_audience, "lifetime_seconds": 600}
        return auth.mint(settings.jwt_keys, **(wanted | claims))

    def bearer(self, permissions: list[str] | None = None, **claims: Any) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token(permissions, **claims)}"}

    async def subscribe(self, **first: Any) -> ClientConnection:
        """A WebSocket whose first message is sent."""
        socket = await connect(f"ws://{self.address}/api/events", proxy=None)
        await socket.send(json.dumps({"token": self.token(), "topics": ["animal:*"]} | first))
        return socket


async def serve_zoo(zoo: Zoo, settings: GatewaySettings, address: str) -> tuple[grpc.aio.Server, Health, int]:
    """The service under the kit's rules, its health, and its port."""
    verifier = auth.TokenVerifier(
        settings.jwt_keys, settings.service_token_path, issuer=settings.jwt_issuer, audience=settings.jwt_audience
    )
    methods = methods_of("zoo.v1.ZooService")
    interceptor = CallInterceptor(methods, verifier, RpcMetrics(CollectorRegistry(), methods))
    server = grpc.aio.server(interceptors=[interceptor], options=SERVER_OPTIONS)
    pb_grpc.add_ZooServiceServicer_to_server(zoo, server)
    serving = Health()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    await serving.report({})
    port = server.add_insecure_port(address)
    await server.start()
    return server, serving, port


@asynccontextmanager
async def running(state: Path, **overrides: Any) -> AsyncIterator[Mesh]:
    """Start service and gateway on free ports; stop both."""
    (state / "keys").mkdir(exist_ok=True, parents=True)
    if not (state / "keys" / "jwt.jwks").exists():
        (state / "keys" / "jwt.jwks").write_bytes(b"0123456789abcdef0123456789abcdef\n")
        (state / "keys" / "service.token").write_text("the-mesh-itself-0123456789abcdef")
    zoo = Zoo()
    settings = GatewaySettings(state_dir=state, **overrides)
    backend, serving, port = await serve_zoo(zoo, settings, "127.0.0.1:0")
    settings.backends = settings.backends or {zoo_stubs.PACKAGE: f"127.0.0.1:{port}"}
    metrics = CollectorRegistry()
    gateway = Gateway(settings, stubs.load([zoo_stubs.PACKAGE]), comments.read(zoo_stubs.image()), metrics)
    try:
        async with listening(gateway, settings) as (address, http):
            yield Mesh(zoo, gateway, metrics, backend, serving, settings, address, http)
    finally:
        await backend.stop(None)


@asynccontextmanager
async def listening(gateway: Gateway, settings: GatewaySettings) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    """A gateway on a free port: its address, and a client of it."""
    listener = listen("127.0.0.1:0", settings.stream_stall_seconds)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    server = _TestServer(server_config(gateway, settings), gateway)
    task = asyncio.create_task(server.serve([listener]))
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=30) as http:
            yield address, http
    finally:
        server.should_exit = True
        await task
