"""The device's memory: its size, how to give some back, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

DEFAULT_SHARE = 0.8
"""Part of the device's memory that is the budget when none is set."""
SHARED_FLOOR = 1_288_490_189
"""Bytes (1.2 GiB) that are left to the system where host and device share one memory."""
KEPT_BYTES = 512 * 2**20
"""Freed memory at the heap's end that the process keeps."""
MAPPED_FROM_BYTES = 64 * 2**20
"""From this size on a tensor is mapped for itself, and returned when it is freed."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""M_... of malloc.h."""
_FRAGMENTED = ("nvmapmemalloc", "nvmap error", "nvmap_alloc")
"""An integrated GPU's allocator found no piece that is large enough, whatever is free in all."""
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "nvml_success == r internal assert failed",  # how an integrated GPU may tell it (pytorch#185240)
    "cuda_error_out_of_memory",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    *_FRAGMENTED,
)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's kind, for example `cpu` or `NVIDIA RTX A5000`, its bytes, and how many of them are ours to use."""

    kind: str
    total_bytes: int
    budget_bytes: int
    park_bytes: int
    """Host memory that parked models may take."""
    shared: bool = False
    """Whether host and device share one memory; then a parked model is an unloaded one, read again from the disk."""


def survey(device: str, limit: int, park_limit: int | None = None) -> DeviceMemory:
    """Size up a device.

    Args:
        device: torch device.
        limit: bytes we may use, from the settings; 0 leaves it to `DEFAULT_SHARE` of what is there. An integrated GPU
            never has more than what is available now but for `SHARED_FLOOR`.
        park_limit: bytes of host memory for parked models; half of what is available when None. None at all where the
            device has no memory of its own, because there a parked model would free nothing.
    """
    host = psutil.virtual_memory()
    shared = False
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        kind, total, shared = properties.name, properties.total_memory, bool(properties.is_integrated)
    else:
        kind, total = platform.processor() or "cpu", host.total
    if shared:
        free = max(0, host.available - SHARED_FLOOR)
        return DeviceMemory(kind, host.total, min(limit, free) if limit else free, 0, shared=True)
    budget = min(limit, total) if limit else int(total * DEFAULT_SHARE)
    return DeviceMemory(kind, total, budget, host.available // 2 if park_limit is None else park_limit)


def held(device: str) -> int:
    """Bytes that the process holds of the device by the allocator's or the system's own figures, in use or not."""
    return torch.cuda.memory_reserved(device) if device.startswith("cuda") else psutil.Process().memory_info().rss


def keep_freed() -> None:
    """Have the C library keep what a forward pass frees for the next one, up to `KEPT_BYTES`; before threads start.

    Else every pass takes its tensors from the system anew, page by page: up to a third of its time on a CPU.
    `give_back` returns it all the same, but for the ends of heaps that threads have made for themselves before.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((_ARENA_MAX, 1), (_TRIM_THRESHOLD, KEPT_BYTES), (_MMAP_THRESHOLD, MAPPED_FROM_BYTES)):
            libc.mallopt(option, value)


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


def is_fragmented(error: BaseException) -> bool:
    """Whether an integrated GPU has memory but no piece that is large enough; only a restart of the board helps."""
    return any(text in str(error).lower() for text in _FRAGMENTED)


def oom_kills(proc: Path = Path("/proc")) -> int:
    """Processes that the kernel ended since it started because memory ran out; 0 where it does not tell."""
    try:
        lines = (proc / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
