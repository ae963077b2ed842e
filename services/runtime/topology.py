"""Who shares a process: the files of `deploy/topologies`.

A topology lists the device-owning processes of one host; registry, gateway, PostgreSQL and NATS run in each.

    description = "…"
    [settings]                 # LENSMESH_<NAME> of every process, unless the environment sets it
    max_resident_models = 2
    [[process]]
    name = "device-0"
    services = ["extraction", "training", "extensions"]    # or ["residency"]: it holds models, and runs no jobs
    device = "cuda:0"          # cpu or cuda:N
    memory_limit = "6GiB"      # the device's byte budget; without it the process finds out itself
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from services.kit.config import parse_bytes
from services.runtime.errors import StartError

SERVICES = ("extraction", "training", "extensions")
RESERVED = ("supervisor", "postgres", "nats", "registry", "gateway")
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """One process that owns a device."""

    name: str
    services: tuple[str, ...]
    device: str
    memory_limit: int | None
    """Bytes; None leaves the decision to the process."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The device-owning processes of one host and the settings that all its processes share."""

    name: str
    processes: tuple[DeviceProcess, ...]
    settings: dict[str, str]


def load_topology(name: str) -> Topology:
    """Read a topology by its name in `deploy/topologies`, or from a path that ends in `.toml`.

    Raises:
        StartError: there is none, or it is not valid; the message names the field.
    """
    directory = DEPLOY / "topologies"
    path = Path(name) if name.endswith(".toml") else directory / f"{name}.toml"
    try:
        text = path.read_text()
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in directory.glob("*.toml")))
        raise StartError(f"no topology {name!r}; there are: {known}") from error
    return parse_topology(path.stem, text)


def parse_topology(name: str, text: str) -> Topology:
    """A topology from the text of its file.

    Raises:
        StartError: not TOML, an unknown or missing field, a service that is in no process, a process name used twice.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StartError(f"topology {name}: {error}") from error
    _refuse_unknown(name, "", content, {"description", "settings", "process"})
    processes = tuple(_process(name, index, entry) for index, entry in enumerate(content.get("process", [])))
    _check_together(name, processes)
    settings = {str(key).upper(): str(value) for key, value in content.get("settings", {}).items()}
    return Topology(name, processes, settings)


def _process(topology: str, index: int, entry: dict[str, object]) -> DeviceProcess:
    where = f"process[{index}]."
    _refuse_unknown(topology, where, entry, {"name", "services", "device", "memory_limit"})
    name, services, device = entry.get("name"), entry.get("services"), entry.get("device")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name) or name in RESERVED:
        raise StartError(f"topology {topology}: {where}name must be a lower-case word that is not one of {RESERVED}")
    alone = services == ["residency"]
    if not isinstance(services, list) or not services or not (alone or set(services) <= set(SERVICES)):
        known = ", ".join(SERVICES)
        raise StartError(f"topology {topology}: {where}services must name one or more of {known}, or residency alone")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda:\d+", device):
        raise StartError(f"topology {topology}: {where}device must be cpu or cuda:N")
    try:
        limit = parse_bytes(entry["memory_limit"]) if "memory_limit" in entry else None
    except ValueError as error:
        raise StartError(f"topology {topology}: {where}memory_limit: {error}") from error
    return DeviceProcess(name, tuple(services), device, limit)


def _check_together(topology: str, processes: tuple[DeviceProcess, ...]) -> None:
    names = [process.name for process in processes]
    for name in names:
        if names.count(name) > 1:
            raise StartError(f"topology {topology}: two processes are called {name}")
    missing = [service for service in SERVICES if not any(service in process.services for process in processes)]
    if missing:
        raise StartError(f"topology {topology}: no process runs {', '.join(missing)}")


def _refuse_unknown(topology: str, where: str, entry: dict[str, object], known: set[str]) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise StartError(f"topology {topology}: unknown field {where}{unknown[0]}")
