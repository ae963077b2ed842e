"""What training speaks of: requests, plans, trainings, checkpoints, transcoders and evaluations, as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

JOB_KIND = "training"
EVALUATION_KIND = "evaluation"
SPLIT_EVALUATION_KIND = "split_evaluation"
"""Of a model over several devices: there is room for one at a time, and those of a comparison wait for each other."""
EVENT_PREFIX = "training"
EVALUATION_PREFIX = "evaluation"
ARTIFACT_KIND = "transcoder"
CHECKPOINT_KIND = "checkpoint"
EXPORT_KIND = "transcoder-export"
SAMPLES_KIND = "feature-samples"
STREAM_KIND = "stream"

LEGACY_SITE = "resid_mid"
"""The stream before the norm, which spec/002 read first; the MLP never sees it."""

EVALUATION_MODES = ("auto", "full", "safe", "cpu")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the catalogue knows about a model."""

    id: str
    model_type: str
    digest: str
    """Content digest of its files; empty while they were not read."""
    num_layers: int
    hidden_size: int
    memory_bytes: int = 0
    """Expected on a device."""


@dataclass(frozen=True, slots=True)
class Cache:
    """An activation cache, or what a live stream would hold if it were one."""

    id: str
    """Empty for a live stream, as its storage_uri."""
    model_id: str
    model_digest: str
    storage_uri: str
    tokens: int
    widths: Mapping[str, int]
    """By hook point."""


@dataclass(frozen=True, slots=True)
class Sites:
    """Which tensors are read and reconstructed; empty means the default."""

    source_site: str = ""
    apply_rmsnorm_scaling: bool | None = None
    target_site: str = ""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of a training are kept, besides the newest."""

    last: int = 3
    """The newest ones."""
    best: int = 1
    """Those of the lowest FVU."""
    every_tokens: int = 0
    """The first of every so many tokens; none when 0."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A training that somebody asks for."""

    model_id: str
    layers: tuple[int, ...]
    cache_id: str
    dataset_id: str
    sites: Sites
    options: Mapping[str, Any]
    """Fields of `TrainConfig` that were given."""
    variants: tuple[tuple[Sites, Mapping[str, Any]], ...] = ()
    """Further configurations, by what they set themselves."""
    devices: int = 1
    tracker: str = ""
    retention: Retention | None = None
    """The settings' when None."""
    live: bool = False
    """Compute the dataset's activations while training; without a cache."""
    split: bool = False
    """With `live`: in the training's own process, which has the model spread over all of its devices."""


@dataclass(frozen=True, slots=True)
class CoderSpec:
    """One coder of a training."""

    name: str
    """Unique within the job."""
    layer: int
    source: str
    """Hook point whose tensor is read from the cache."""
    target: str
    """Hook point that is reconstructed."""
    source_hook_point: str
    """What the source is called for others; another name of the same tensor."""
    source_site: str
    target_site: str
    apply_rmsnorm_scaling: bool
    config: Mapping[str, Any]
    """Fields of `TrainConfig`."""

    @property
    def hook_points(self) -> dict[str, Any]:
        """What its weights' info says of its input and output."""
        return {
            "source_hook_point": self.source_hook_point,
            "target_hook_point": self.target,
            "apply_rmsnorm_scaling": self.apply_rmsnorm_scaling,
        }

    @property
    def pair(self) -> str:
        """Names the stream of rows that it shares with coders of the same two hook points."""
        return f"{self.source} {self.target}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A training with everything decided that can be decided before its data is there."""

    coders: tuple[CoderSpec, ...]
    num_tokens: int
    """0: the data once."""
    base_digest: str = ""
    """Content digest of the model that made the data; empty until that is there."""
    devices: int = 1
    """What it takes: of as many ranks each has one, or one process has them all, with the model split over them."""
    threads: int = 0
    """CPU threads of all ranks together: part of what decides the bits; 0 until the first start."""
    tracker: str = ""
    """External tracker that its figures go to as well."""
    live: bool = False
    """Its activations are computed while it runs."""
    split: bool = False
    """By its own process, on all of its devices."""

    @property
    def ranks(self) -> int:
        """Processes that train together, each on its share of every batch."""
        return 1 if self.split else self.devices

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Everything that is read from the cache."""
        return tuple(dict.fromkeys(point for coder in self.coders for point in (coder.source, coder.target)))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Plan:
        """What `as_json` gave."""
        return cls(**{**raw, "coders": tuple(CoderSpec(**coder) for coder in raw["coders"])})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that a training can go on from."""

    id: str
    step: int
    tokens_seen: int
    fvu: float
    artifact_uri: str
    size_bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a retention keeps and deletes, oldest first."""

    kept: Sequence[Checkpoint]
    deleted: Sequence[Checkpoint]


@dataclass(frozen=True, slots=True)
class Task:
    """What a claimed training is to do."""

    job_id: str
    model_id: str
    dataset_id: str | None
    cache_id: str | None
    plan: Plan
    checkpoint: Checkpoint | None
    """To go on from, or to make transcoders of where `finalize` says so."""
    finalize: bool
    transcoder_ids: tuple[str, ...]
    """Set when it was done already, and only the job's end is missing."""
    created_by: str


@dataclass(frozen=True, slots=True)
class Training:
    """One training as it stands."""

    job_id: str
    model_id: str
    layers: Sequence[int]
    status: str
    progress: float
    plan: Plan
    dataset_id: str | None
    cache_id: str | None
    retention: Retention
    figures: Mapping[str, Any]
    """Of the last step that was told: the fields of API.md and `coders`; empty before the first."""
    checkpoints: Sequence[Checkpoint]
    transcoder_ids: Sequence[str]
    error_code: str | None
    error_message: str | None
    waiting_for: str | None
    created_by: str
    created_at: datetime | None
    finished_at: datetime | None
    estimated_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NewTranscoder:
    """A transcoder's row before it has an id and files."""

    coder: str
    name: str
    model_id: str
    layer: int
    source_hook_point: str
    target_hook_point: str
    d_in: int
    d_out: int
    dict_size: int
    group_sizes: Sequence[int]
    top_k: int
    activation: str
    base_digest: str
    tokens_seen: int
    train_fvu: float


@dataclass(frozen=True, slots=True)
class Transcoder:
    """One transcoder as it is stored."""

    id: str
    name: str
    model_id: str
    layer: int
    source_hook_point: str
    target_hook_point: str
    job_id: str
    d_in: int
    d_out: int
    dict_size: int
    group_sizes: Sequence[int]
    top_k: int
    activation: str
    artifact_uri: str
    size_bytes: int
    base_digest: str
    tokens_seen: int
    train_fvu: float
    created_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Judged:
    """What an evaluation judges: a transcoder, or one coder of a training's checkpoint."""

    model_id: str
    layer: int
    base_digest: str
    artifact_uri: str
    names: Mapping[str, str]
    """Whose figures they are, in the job's result."""
    coder: CoderSpec | None = None
    """Of a checkpoint."""

    @property
    def transcoder_id(self) -> str:
        """Empty for a checkpoint's."""
        return self.names.get("transcoder_id", "")


@dataclass(frozen=True, slots=True)
class WantedComparison:
    """Evaluations on the same text that somebody asks for."""

    transcoder_ids: Sequence[str]
    checkpoints: Sequence[tuple[str, str, str]]
    """Training, checkpoint (the newest when empty) and coder (all of them when empty)."""
    common: WantedEvaluation
    """What all of them have in common."""


@dataclass(frozen=True, slots=True)
class WantedEvaluation:
    """An evaluation that somebody asks for; 0 means the default."""

    transcoder_id: str
    """Empty where a checkpoint's coder is judged."""
    dataset_id: str
    num_batches: int = 0
    batch_size: int = 0
    max_length: int = 0
    mode: str = "auto"
    prefix: int = 0
    samples_per_feature: int = 0
    training_id: str = ""
    checkpoint_id: str = ""
    coder: str = ""
    devices: int = 1
    """That the model is split over."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation that has ended well."""

    id: str
    transcoder_id: str
    training_id: str
    checkpoint_id: str
    coder: str
    dataset_id: str
    job_id: str
    figures: Mapping[str, Any]
    """Under API.md's names."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Queued:
    """A job that was queued, and the resource it fills."""

    job_id: str
    resource_id: str


@dataclass(frozen=True, slots=True)
class Feature:
    """An active latent."""

    feature: int
    activation: float


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows; what is empty or None does not matter."""

    model_id: str = ""
    status: str = ""
    layer: int | None = None
    transcoder_id: str = ""
    limit: int = 50
    offset: int = 0
    page_token: str = field(default="")
