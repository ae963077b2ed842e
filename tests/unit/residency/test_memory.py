"""Every face of running out of memory, and what the budget is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from services.kit import errors
from services.residency import spoken
from services.residency.failures import insufficient_memory, translated
from services.residency.memory import SHARED_FLOOR, is_out_of_memory, oom_kills, survey


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
        RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12"),
        RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("cudaErrorMemoryAllocation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
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


def test_memory_in_pieces_is_told_from_memory_that_is_gone():
    assert (
        "restart of the board" in translated(RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12")).message
    )
    assert "restart" not in translated(RuntimeError("CUDA error: out of memory")).message


@pytest.fixture
def orin(monkeypatch):
    """An integrated GPU of a board with 7.4 GiB, of which 5 GiB are available."""
    properties = SimpleNamespace(name="Orin", total_memory=7 << 30, is_integrated=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    host = SimpleNamespace(total=7_945_689_498, available=5 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)


def test_an_integrated_gpu_has_one_ledger_with_its_host_and_parks_on_the_disk(orin):
    found = survey("cuda:0", 0, 1 << 30)
    assert (found.total_bytes, found.shared, found.park_bytes) == (7_945_689_498, True, 0)
    assert found.budget_bytes == (5 << 30) - SHARED_FLOOR
    assert survey("cuda:0", 6 << 30).budget_bytes == (5 << 30) - SHARED_FLOOR
    assert survey("cuda:0", 3 << 30).budget_bytes == 3 << 30


def test_a_discrete_gpu_keeps_its_own_ledger(orin, monkeypatch):
    properties = SimpleNamespace(name="A5000", total_memory=24 << 30, is_integrated=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = survey("cuda:0", 0)
    assert (found.total_bytes, found.shared, found.park_bytes) == (24 << 30, False, (5 << 30) // 2)


def test_the_kernels_kills_for_memory_are_counted(tmp_path):
    assert oom_kills(tmp_path) == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")
    assert oom_kills(tmp_path) == 3


@pytest.mark.parametrize(("kills", "reason"), [(0, "TRAINING_FAILED"), (1, "DEVICE_OOM")])
async def test_a_child_that_the_kernel_ended_for_memory_ran_out_of_it(monkeypatch, kills, reason):
    counted = iter((5, 5 + kills))
    monkeypatch.setattr(spoken, "oom_kills", lambda: next(counted))
    kill_itself = "import os; os.kill(os.getpid(), 9)"
    pipe = asyncio.subprocess.PIPE
    child = spoken.Spoken(await asyncio.create_subprocess_exec(sys.executable, "-c", kill_itself, stdout=pipe))
    with pytest.raises(errors.LensmeshError) as caught:
        await child.hear()
    assert (caught.value.reason, caught.value.transient) == (reason, True)


def test_the_numbers_of_a_refusal_are_in_gb():
    refused = insufficient_memory(14_100_000_000, 5_200_000_000)
    assert refused.metadata == {"required_memory_gb": 14.1, "available_memory_gb": 5.2}


REUSED = """
import resource
import torch
from services.residency import memory

def passes():
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        # Like a forward pass: two tensors live at once, of some megabytes each.
        first = torch.ones(3 * 2**20); second = first + 1
        del first, second
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults

memory.keep_freed()
print(sorted(passes()[10:])[5], memory.give_back("cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_a_forward_pass_takes_the_memory_that_the_one_before_it_freed_and_an_unload_returns_it():
    done = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, text=True, check=True)
    faults, returned = map(int, done.stdout.split())
    assert faults < 300, "24 MiB are 6,144 pages"
    assert returned > 20 * 2**20
