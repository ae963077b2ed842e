"""What a machine offers, found out without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from services.runtime.errors import StartError
from services.runtime.nats import find_nats_server
from services.runtime.postgres import find_binaries

_SHOWN = ("lensmesh", "torch", "transformers", "bitsandbytes", "peft", "grpcio", "protobuf")


def examine() -> dict[str, Any]:
    """Python, memory, devices, versions, and what `lensmesh up` would miss; `ok` is whether a mesh can run here."""
    missing = [
        *_missing("LENSMESH_NATS_URL", find_nats_server),
        *_missing("LENSMESH_DATABASE_URL", find_binaries),
        *([] if _version("torch") else ["torch is not installed: pip install 'lensmesh[device]'"]),
    ]
    return {
        "ok": not missing,
        "missing": missing,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_total_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "gpus": _gpus(),
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a mesh can do, those that are installed."""
    return {name: found for name in _SHOWN if (found := _version(name))}


def _missing(variable: str, find: Any) -> list[str]:
    if os.environ.get(variable):
        return []
    try:
        find()
    except StartError as error:
        return [str(error)]
    return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=20)
    return told.stdout.splitlines() if told.returncode == 0 else []
