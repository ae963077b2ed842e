"""What extraction speaks of: requests, what they resolve to, extractions and caches, as plain records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from blake3 import blake3

from services.residency.shards import Layout
from services.residency.texts import Encoding, SpecialTokens

JOB_KIND = "extraction"
EVENT_PREFIX = "extraction"
ARTIFACT_KIND = "activation_cache"
REUSED_MESSAGE = "Using cached activations"

Match = Literal["hit", "subset", "miss"]
IfUnloaded = Literal["load", "wait", "fail"]
Mode = Literal["full", "safe", "cpu", "auto"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the catalogue knows about a model."""

    id: str
    model_type: str
    identifier: str
    revision: str
    digest: str
    """Content digest of its files."""
    quantization: str
    config: Mapping[str, Any]
    """Its Hugging Face config; empty while its files were not read."""
    num_layers: int
    hidden_size: int
    context_length: int
    parameter_count: int
    batch_size: int
    """Sequences of a forward pass that fit such a model."""
    loaded: bool = True
    """Whether it is on some device."""
    source: str = "local"
    """huggingface, local or custom."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a dataset before it is tokenised."""

    digest: str
    """Of its content, of its name where only the hub knows that; and of the tokenizer that makes tokens of it."""
    size_bytes: int
    rows: int | None
    """None where counting would mean to download it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An extraction that somebody asks for; zero and empty mean the default."""

    model_id: str
    dataset_id: str
    layer_indices: tuple[int, ...] = ()
    hook_points: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    layout: Layout | None = None
    sample_count: int | None = None
    batch_size: int = 0
    max_length: int = 0
    dtype: str = ""
    extension_id: str = ""
    seed: int = 0
    max_tokens: int = 0
    apply_rmsnorm_scaling: bool = False
    special_tokens: SpecialTokens = "tokenizer"
    packing: bool = False
    if_unloaded: IfUnloaded = "load"
    mode: Mode = "auto"
    keep_order: bool = False


@dataclass(frozen=True, slots=True)
class WantedStream:
    """Activations that somebody wants as they are computed."""

    wanted: Wanted
    cursor: int
    """Rows that the reader has already."""
    offset: int
    """Bytes that it has of the block behind them."""
    rows: int
    """Rows after which the stream ends; 0 is never."""
    buffer_bytes: int
    """Most bytes held for mixing; 0 is the default."""
    place: str
    """The reader's directory; empty where it has none."""


@dataclass(frozen=True, slots=True)
class Options:
    """A request with every default resolved; plain JSON, part of the job."""

    hook_points: tuple[str, ...]
    layout: Layout
    dtype: str
    batch_size: int
    max_length: int
    sample_count: int | None
    """Dataset rows to use; None is all."""
    max_tokens: int
    """Tokens to use; 0 is all."""
    extension_id: str
    extension_uri: str
    """Handle of that extension's files, which names their content; empty without one."""
    seed: int
    special_tokens: SpecialTokens = "tokenizer"
    packing: bool = False
    if_unloaded: IfUnloaded = "load"
    mode: Mode = "auto"
    batch_tokens: int | None = None
    """Most tokens of a forward pass of several sequences, padding included."""
    keep_order: bool = False
    """Whether the rows of a shard are left as they were computed."""

    @property
    def encoding(self) -> Encoding:
        """How the dataset's rows become sequences."""
        return Encoding(self.max_length, self.special_tokens, self.packing, spans=True)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"hook_points": list(self.hook_points)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Options:
        """What `as_json` gave."""
        return cls(**{**raw, "hook_points": tuple(raw["hook_points"])})

    def key(self, model: BaseModel, dataset: Survey) -> str:
        """Digest of everything that decides a cache's content, hook points left out: a superset serves a subset."""
        options = self.as_json()
        for name in ("hook_points", "extension_id", "if_unloaded", "mode"):
            del options[name]
        if self.sample_count is None and dataset.rows is not None:
            options["sample_count"] = dataset.rows
        if any(name.endswith(".hook_pattern") for name in self.hook_points):
            options["attention"] = "eager"  # which rounds otherwise, in every other hook point too
        names = (model.identifier, model.revision, model.digest, model.quantization, dataset.digest)
        return blake3(json.dumps([names, options], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rates:
    """What earlier extractions took; None where there was none."""

    tokens_per_second: float | None
    tokens_per_sample: float | None
    overhead_seconds: float = 0.0
    """Before the first batch and behind the last; the least of the last three, so that no load of a model is in it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an extraction is expected to take."""

    seconds: float
    size_bytes: int
    samples: int


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to `validate_only`."""

    estimate: Estimate
    match: Match
    fits_limit: bool


@dataclass(frozen=True, slots=True)
class NewExtraction:
    """An extraction that is about to be stored."""

    id: str
    model_id: str
    dataset_id: str
    options: Options
    key: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Task:
    """What a claimed job is to do."""

    extraction_id: str
    model_id: str
    dataset_id: str
    options: Options
    cache_id: str | None
    """Set when it was done already, and only the job's end is missing."""
    plan_digest: str | None
    """Of the plan that its units were made by; None where nobody has planned it yet."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """One extraction as it stands."""

    id: str
    job_id: str | None
    model_id: str
    dataset_id: str
    status: str
    """queued, extracting, completed, failed, cancelled or paused."""
    progress: float
    hook_points: Sequence[str]
    total_samples: int
    samples_processed: int
    tokens: int
    cache_id: str | None
    storage_uri: str | None
    size_bytes: int | None
    activation_shape: Sequence[int]
    reused: bool
    estimated_seconds: float
    seconds: float | None
    tokens_per_second: float | None
    identity_error: float | None
    waiting_for: str | None
    error_code: str | None
    error_message: str | None
    created_by: str
    created_at: datetime
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        """Nothing happens to it any more."""
        return self.status in {"completed", "failed", "cancelled"}

    @property
    def message(self) -> str:
        """A sentence for a person."""
        match self.status:
            case "completed":
                return REUSED_MESSAGE if self.reused else "Activations extracted"
            case "queued":
                return "Activation extraction queued"
            case "extracting":
                return f"{self.samples_processed} of {self.total_samples} samples"
            case "failed":
                return self.error_message or "Activation extraction failed"
        return f"Activation extraction {self.status}"


@dataclass(frozen=True, slots=True)
class Cache:
    """One activation cache as it is stored."""

    id: str
    model_id: str
    dataset_id: str | None
    storage_uri: str
    size_bytes: int
    manifest: Mapping[str, Any]
    """The manifest's JSON."""
    created_at: datetime
    last_accessed_at: datetime

    @property
    def hook_points(self) -> list[str]:
        """Names of what it holds."""
        return [point["name"] for point in self.manifest["hook_points"]]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which of them."""

    model_id: str = ""
    status: str = ""
    limit: int = 50
    offset: int = 0
    page_token: str = ""
