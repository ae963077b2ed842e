"""The device's memory: its size, how to give some back, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from dataclasses import dataclass

import psutil
import torch

DEFAULT_SHARE = 0.8
"""Part of the device's memory that is the budget when none is set."""
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "nvml_success == r internal assert failed",  # how an integrated GPU may tell it (pytorch#185240)
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's kind, for example `cpu` or `NVIDIA RTX A5000`, its bytes, and how many of them are ours to use."""

    kind: str
    total_bytes: int
    budget_bytes: int
    park_bytes: int
    """Host memory that parked models may take."""


def survey(device: str, limit: int, park_limit: int | None = None) -> DeviceMemory:
    """Size up a device.

    Args:
        device: torch device.
        limit: bytes we may use, from the settings; 0 leaves it to `DEFAULT_SHARE` of what is there.
        park_limit: bytes of host memory for parked models; when None half of what is available, and nothing where the
            device has no memory of its own, because there a parked model would free nothing.
    """
    host = psutil.virtual_memory()
    shared = False
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        kind, total, shared = properties.name, properties.total_memory, bool(properties.is_integrated)
    else:
        kind, total = platform.processor() or "cpu", host.total
    if park_limit is None:
        park_limit = 0 if shared else host.available // 2
    return DeviceMemory(kind, total, min(limit, total) if limit else int(total * DEFAULT_SHARE), park_limit)


def held(device: str) -> int:
    """Bytes that the process holds of the device by the allocator's or the system's own figures, in use or not."""
    return torch.cuda.memory_reserved(device) if device.startswith("cuda") else psutil.Process().memory_info().rss


def give_back(device: str) -> int:
    """Return freed memory to the device or the system, so that an unload shows in their figures; returns the bytes."""
    before = held(device)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return max(0, before - held(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, in any of the ways that torch, CUDA and the system tell it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def utilization(device: str) -> float | None:
    """How busy the device is, 0 to 1, since the last call; None where the platform does not tell."""
    if not device.startswith("cuda"):
        return psutil.cpu_percent() / 100
    try:
        return torch.cuda.utilization(device) / 100
    except (RuntimeError, ModuleNotFoundError):
        return None


def temperature(device: str) -> float | None:
    """Degrees Celsius, None where the platform does not tell."""
    if not device.startswith("cuda"):
        return None
    try:
        return float(torch.cuda.temperature(device))
    except (RuntimeError, ModuleNotFoundError):
        return None
