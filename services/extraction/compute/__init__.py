"""Activations as tensors: capture them, plan a dataset into units, fill a unit. No files, no network; works anywhere.

for found in capture(model, [ids], ["blocks.2.mlp.hook_in"]): ...

plan = make_plan(sequences, layout="rows", seed=0, batch_size=8, row_bytes=1024)
for filled in fill_units(model, sequences, plan, hook_points=["blocks.2.mlp.hook_in"], dtype=torch.float32):
    save_file(filled.tensors, f"{filled.unit.index}.safetensors")
    filled.release()
"""

from __future__ import annotations

from services.extraction.compute.buffers import Buffers
from services.extraction.compute.capture import capture, identity_errors, paired_layers
from services.extraction.compute.moments import Moments
from services.extraction.compute.pace import Pace, bytes_at_work
from services.extraction.compute.plan import Plan, Unit, make_plan, plan_again, plan_arrays
from services.extraction.compute.tables import hook_point_entries, merged, sequence_tensors, statistics_tensors
from services.extraction.compute.unit import UnitFiller, fill_units

__all__ = [
    "Buffers",
    "Moments",
    "Pace",
    "Plan",
    "Unit",
    "UnitFiller",
    "bytes_at_work",
    "capture",
    "fill_units",
    "hook_point_entries",
    "identity_errors",
    "make_plan",
    "merged",
    "paired_layers",
    "plan_again",
    "plan_arrays",
    "sequence_tensors",
    "statistics_tensors",
]
