"""Every face of running out of memory, and what the budget is."""

from __future__ import annotations

import psutil
import pytest
import torch

from services.kit import errors
from services.residency.failures import insufficient_memory, translated
from services.residency.memory import is_out_of_memory, survey


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_face_of_out_of_memory_is_one_error(error):
    assert is_out_of_memory(error)
    known = translated(error)
    assert isinstance(known, errors.Exhausted)
    assert (known.reason, known.transient) == ("DEVICE_OOM", True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(2, "No such file"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
    assert translated(error) is None


def test_the_real_allocators_failure_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_budget_is_the_setting_or_a_share_of_the_device():
    total = psutil.virtual_memory().total
    assert survey("cpu", 0).budget_bytes == int(0.8 * total)
    assert survey("cpu", 6 << 30).budget_bytes == min(6 << 30, total)
    assert survey("cpu", 1 << 60).budget_bytes == total


def test_the_numbers_of_a_refusal_are_in_gb():
    refused = insufficient_memory(14_100_000_000, 5_200_000_000)
    assert refused.metadata == {"required_memory_gb": 14.1, "available_memory_gb": 5.2}
