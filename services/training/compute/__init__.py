"""Transcoder training in pure torch, for the service and for notebooks.

transcoder, reports = fit(x, y, TrainConfig(dict_size=4096, num_tokens=400_000, group_sizes=(256, 512, 1024, 2304)))
"""

from __future__ import annotations

from services.residency.lenses.transcoder import Transcoder
from services.training.compute.batches import InMemory, Source, Stream
from services.training.compute.coder import NonFiniteLoss
from services.training.compute.config import ConfigError, TrainConfig
from services.training.compute.fit import fit
from services.training.compute.formats import FORMATS, Export, export, load_foreign
from services.training.compute.metrics import FvuAccumulator, compute_fvu
from services.training.compute.report import StepReport
from services.training.compute.trainer import CoderPlan, Trainer, coders_of

__all__ = [
    "FORMATS",
    "CoderPlan",
    "ConfigError",
    "Export",
    "FvuAccumulator",
    "InMemory",
    "NonFiniteLoss",
    "Source",
    "StepReport",
    "Stream",
    "TrainConfig",
    "Trainer",
    "Transcoder",
    "coders_of",
    "compute_fvu",
    "export",
    "fit",
    "load_foreign",
]
