"""Which code runs int8 and int4 on a device: found out by running it, for an import that works proves nothing.

Run as a program it probes one device in a process of its own, so that a kernel that kills the CUDA context kills that
process only: `python -m services.residency.kernels cuda:0` prints what runs.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import torch

BITSANDBYTES, TORCH = "bitsandbytes", "torch"
SIDE = 64
PROBE_SECONDS = 300
ERRORS = {"int8": 0.05, "int4": 0.25}
"""Relative error of a product with a random weight beyond which a kernel is broken."""


@cache
def kernel_of(quantization: str, device: str) -> str:
    """`bitsandbytes` where it runs and computes what it should on this device, else our own `torch`; asked once."""
    if device == "meta":
        return BITSANDBYTES
    if device.startswith("cuda"):
        return BITSANDBYTES if quantization in _probed_apart(device) else TORCH
    return BITSANDBYTES if runs(quantization, device) else TORCH


@cache
def _probed_apart(device: str) -> frozenset[str]:
    command = [sys.executable, "-m", "services.residency.kernels", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return frozenset()
    return frozenset(done.stdout.split()) if done.returncode == 0 else frozenset()


def runs(quantization: str, device: str) -> bool:
    """Whether bitsandbytes quantises and multiplies here with a small enough error. Never raises."""
    from services.residency.quantize import bitsandbytes_linear  # noqa: PLC0415 - which asks this module

    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(SIDE, SIDE, generator=draw), torch.randn(4, SIDE, generator=draw)
    try:
        module = bitsandbytes_linear(weight, bias=False, quantization=quantization, dtype=torch.float32, device=device)
        with torch.no_grad():
            found = module.eval()(x.to(device)).cpu()
    except Exception:
        return False
    expected = x @ weight.T
    return bool((found - expected).norm() <= ERRORS[quantization] * expected.norm())


if __name__ == "__main__":
    sys.stdout.write(" ".join(quantization for quantization in ERRORS if runs(quantization, sys.argv[1])))
