"""Which processes make up a mesh, and what each is told: addresses, environment, readiness."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.runtime.errors import StartError
from services.runtime.ports import join_address, reserve_all
from services.runtime.process import Probe, ProcessSpec
from services.runtime.topology import DEPLOY, SERVICES, DeviceProcess, Topology

_LOOPBACK = "127.0.0.1"
_WILDCARDS = {"0.0.0.0": _LOOPBACK, "[::]": "[::1]"}  # noqa: S104


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first process starts."""

    topology: Topology
    state: Path
    http: str
    """host:port of the gateway."""
    grpc: dict[str, str]
    """gRPC host:port by process name."""
    metrics: dict[str, str]
    """host:port of the metrics and readiness listener by process name."""
    environment: dict[str, str]
    """Variables that every process of the mesh gets."""
    postgres_port: int
    nats_port: int

    def address_of(self, service: str) -> str:
        """Address of a service: of the first of several processes that run it, which all answer alike."""
        if service == "registry":
            return self.grpc["registry"]
        return next(self.grpc[process.name] for process in self.topology.processes if service in process.services)

    def addresses(self) -> dict[str, str]:
        """Addresses by service."""
        return {service: self.address_of(service) for service in ("registry", *SERVICES)}


def make_plan(topology: Topology, state: Path, http: tuple[str, int], lifeline: Mapping[str, str]) -> Plan:
    """Choose ports and compose the environment.

    Raises:
        StartError: the HTTP port is taken.
    """
    names = ["registry", *(process.name for process in topology.processes)]
    wanted = [http] + [(_LOOPBACK, 0)] * (2 * len(names) + 3)
    http_port, postgres_port, nats_port, supervisor, *rest = reserve_all(wanted)
    grpc = {name: join_address(_LOOPBACK, port) for name, port in zip(names, rest, strict=False)}
    metrics = {name: join_address(_LOOPBACK, port) for name, port in zip(names, rest[len(names) :], strict=True)}
    metrics["supervisor"] = join_address(_LOOPBACK, supervisor)
    return Plan(
        topology=topology,
        state=state,
        http=join_address(http[0], http_port),
        grpc=grpc,
        metrics=metrics,
        environment=_environment(topology, state, lifeline, grpc),
        postgres_port=postgres_port,
        nats_port=nats_port,
    )


def registry_spec(plan: Plan) -> ProcessSpec:
    """The registry's process."""
    return _serve(plan, "registry", ("registry",), (), {})


def device_spec(plan: Plan, process: DeviceProcess) -> ProcessSpec:
    """One device-owning process; a GPU is made the only one it sees, before torch is imported."""
    environment = {}
    if process.memory_limit is not None and "LENSMESH_DEVICE_MEMORY_LIMIT" not in plan.environment:
        environment["LENSMESH_DEVICE_MEMORY_LIMIT"] = str(process.memory_limit)
    if process.device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = process.device.removeprefix("cuda:")
    return _serve(plan, process.name, process.services, ("--device", process.device), environment)


def gateway_spec(plan: Plan) -> ProcessSpec:
    """The gateway's process; it learns of services only through LENSMESH_BACKENDS."""
    backends = ",".join(f"lensmesh.{service}.v1={address}" for service, address in plan.addresses().items())
    return ProcessSpec(
        name="gateway",
        argv=(sys.executable, "-m", "gateway"),
        environment={**plan.environment, "LENSMESH_BACKENDS": backends, "LENSMESH_HTTP_LISTEN": plan.http},
        directory=DEPLOY.parent,
        probe=http_probe(f"http://{connectable(plan.http)}/readyz"),
    )


def connectable(address: str) -> str:
    """The address a client on this machine uses for a listener: loopback for a wildcard."""
    host, _, port = address.rpartition(":")
    return f"{_WILDCARDS.get(host, host)}:{port}"


def http_probe(url: str) -> Probe:
    """Ready when the URL answers 200; else what its body says."""

    async def probe() -> str | None:
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
                answer = await client.get(url)
        except httpx.HTTPError as error:
            return f"{url} ({type(error).__name__})"
        return None if answer.status_code == 200 else answer.text[:500]

    return probe


def _serve(
    plan: Plan, name: str, services: tuple[str, ...], options: tuple[str, ...], environment: Mapping[str, str]
) -> ProcessSpec:
    listen, metrics = plan.grpc[name], plan.metrics[name]
    return ProcessSpec(
        name=name,
        argv=(
            *(sys.executable, "-m", "services.cli", "serve", *services, *options),
            *("--listen", listen, "--metrics", metrics),
        ),
        environment={**plan.environment, "LENSMESH_HOST_ID": name, **environment},
        directory=DEPLOY.parent,
        probe=http_probe(f"http://{metrics}/readyz"),
    )


def _environment(
    topology: Topology, state: Path, lifeline: Mapping[str, str], grpc: Mapping[str, str]
) -> dict[str, str]:
    inherited = dict(os.environ)
    extraction = next(process.name for process in topology.processes if "extraction" in process.services)
    settings = {f"LENSMESH_{name}": value for name, value in topology.settings.items()}
    return {
        **settings,
        **inherited,
        **lifeline,
        "PYTHONUNBUFFERED": "1",
        "LENSMESH_STATE_DIR": str(state),
        "LENSMESH_REGISTRY_ADDRESS": grpc["registry"],
        "LENSMESH_EXTRACTION_ADDRESS": grpc[extraction],
        "LENSMESH_MODEL_ROOTS": _roots("LENSMESH_MODEL_ROOTS", DEPLOY / "demo"),
        "LENSMESH_DATASET_ROOTS": _roots("LENSMESH_DATASET_ROOTS", dataset_root()),
    }


def dataset_root() -> Path:
    """Where the demo writes its texts: outside every state directory, which no root may contain or lie in."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "lensmesh" / "datasets"


def _roots(variable: str, last: Path) -> str:
    """The caller's roots as absolute paths, then our own, which must exist."""
    try:
        last.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"{last} cannot be created: {error.strerror} (XDG_CACHE_HOME moves it)") from error
    given = [str(Path(part).absolute()) for part in os.environ.get(variable, "").split(":") if part]
    return ":".join([*given, str(last)])
