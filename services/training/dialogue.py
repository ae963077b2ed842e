"""What a service and its training process say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.residency.lines import Gone, Words


@dataclass(frozen=True, slots=True)
class Live:
    """Where a live stream of activations comes from, and what it holds."""

    address: str
    """Of the extraction service, host:port."""
    state_dir: str
    """Where the mesh's own token is."""
    tls_ca_file: str
    """Roots to check the service by; empty without TLS."""
    folder: str
    """Empty directory that blocks may come through."""
    model_id: str
    dataset_id: str
    hook_points: Sequence[str]
    seed: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A model over all devices of a process."""

    directory: str
    """Of the model's files."""
    quantization: str
    spread: Mapping[str, int]
    """Path of a module to the number of its device."""
    devices: Sequence[str]
    """As torch names them in the process."""


@dataclass(frozen=True, slots=True)
class Split(Spread):
    """A model that the process itself computes activations with."""

    folder: str
    """Where the dataset's tokens are."""
    uncounted: Sequence[int]
    """Token ids whose rows are not trained on."""


@dataclass(frozen=True, slots=True)
class Start:
    """First line to the process."""

    plan: Mapping[str, Any]
    """`Plan.as_json`, settled."""
    device: str
    """As torch names it in each rank."""
    ranks: Sequence[str] = ("cpu",)
    """Devices of each rank, as `gang.program` takes them."""
    threads: int = 1
    """CPU threads of each rank."""
    cache: str = ""
    """Directory of the activation cache; none where no step is to be made, or with `live` or `split`."""
    live: Mapping[str, Any] | None = None
    """Fields of `Live`, instead of a cache."""
    split: Mapping[str, Any] | None = None
    """Fields of `Split`, instead of a cache."""
    state: str = ""
    """Directory of the checkpoint to go on from; none at the beginning."""


@dataclass(frozen=True, slots=True)
class Judge:
    """First line to a process that evaluates; answered by `Passed` and `Found`."""

    model: Mapping[str, Any]
    """Fields of `Spread`."""
    subject: Mapping[str, Any]
    """Fields of `judgements.Subject`."""
    batches: str
    """File with `ids`, `mask` and `counted` of every batch, each name with the batch's number behind a dot."""
    prefix: int
    """Groups of the dictionary that are used; all when 0."""
    samples: str
    """Empty directory for feature samples."""
    samples_per_feature: int
    facts: Mapping[str, Any]
    """That belong to them."""
    ranks: Sequence[str]
    """One: all of its devices, as `gang.program` takes them."""
    threads: int


@dataclass(frozen=True, slots=True)
class Save:
    """To the process: write a checkpoint into this empty directory; answered by `Saved`."""

    folder: str


@dataclass(frozen=True, slots=True)
class Write:
    """To the process after `Finished`: write transcoders, by coder, and end; answered by `Written`."""

    folders: Mapping[str, str]
    infos: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Progress:
    """From the process: the last step's figures."""

    step: int
    tokens_seen: int
    tokens_per_second: float
    eta_seconds: float
    coders: list[dict[str, Any]]
    """`StepReport.to_dict` of each."""


@dataclass(frozen=True, slots=True)
class Saved:
    """From the process: a checkpoint is written."""

    step: int
    tokens_seen: int
    fvu: float
    """Of the batch before it, mean over coders; 1 before the first."""


@dataclass(frozen=True, slots=True)
class Finished:
    """From the process: no step is left."""

    step: int
    tokens_seen: int
    train_fvu: Mapping[str, float]
    """By coder, the mean over the last batches."""


@dataclass(frozen=True, slots=True)
class Written:
    """From the process: the transcoders are written; it ends now."""

    widths: Mapping[str, Sequence[int]]
    """By coder, d_in and d_out."""


@dataclass(frozen=True, slots=True)
class Passed:
    """From a process that evaluates: so many passes over a batch are done."""

    done: int


@dataclass(frozen=True, slots=True)
class Found:
    """From a process that evaluates: what it found; the samples are written, and it ends."""

    figures: Mapping[str, Any]


Command = Start | Judge | Save | Write
Message = Progress | Saved | Finished | Written | Passed | Found | Gone
WORDS = Words(Start, Judge, Save, Write, Progress, Saved, Finished, Written, Passed, Found)
