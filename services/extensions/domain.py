"""What the extension service speaks of: extensions, trainings and measurements, as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

JOB_KIND = "extension_training"
MERGE_KIND = "extension_merge"
MODEL_ARTIFACT = "model"
ARTIFACT_KIND = "extension"
CHECKPOINT_KIND = "extension_checkpoint"


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA adapters."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ()
    variant: str = "lora"
    """lora, rslora, dora or adalora."""
    target_r: int | None = None
    """Mean rank that adalora is pruned to."""


@dataclass(frozen=True, slots=True)
class Layer:
    """An inserted layer."""

    position: str = ""
    """encoder, decoder or both; empty for the only stack, or the encoder."""
    index: int | None = None
    """Index the new layer will have; None for the end of the stack."""
    initialization_scale: float = 0.01
    mlp_width: int | None = None
    """Neurons of its MLP; None for those of its neighbour."""
    from_step: int = 0
    """Training step before which it is inserted."""


@dataclass(frozen=True, slots=True)
class NewExtension:
    """An extension that somebody asks for."""

    model_id: str
    task_name: str
    kind: str
    """lora, layer or hybrid."""
    lora: Lora | None = None
    layers: tuple[Layer, ...] = ()
    freeze_base: bool = True
    shared_layer_of: str = ""
    train_shared_layer: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the catalogue knows about a base."""

    id: str
    model_type: str
    config: Mapping[str, Any]
    """Its Hugging Face config."""
    parameter_count: int
    digest: str
    """Content digest of its files."""
    name: str = ""
    quantization: str = "none"


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension as it is stored."""

    id: str
    model_id: str
    task_name: str
    kind: str
    lora: Lora | None
    layers: tuple[Layer, ...]
    parameter_counts: Mapping[str, float]
    base_digest: str
    created_by: str
    freeze_base: bool = True
    shared_layer_of: str = ""
    """Extension whose layers these were first; all that name it compute with the same ones."""
    train_shared_layer: bool = False
    status: str = "created"
    """created, training, trained or failed."""
    artifact_uri: str = ""
    digest: str = ""
    size_bytes: int = 0
    trained_steps: int = 0
    loss_before: float | None = None
    """Held-out loss before the last training, nats per token."""
    loss_after: float | None = None
    job_id: str | None = None
    """Its last training."""
    error_code: str | None = None
    error_message: str | None = None
    created_at: datetime | None = None
    active: bool = False
    """It is the active lens of its base."""


@dataclass(frozen=True, slots=True)
class NewTraining:
    """A training that somebody asks for; zero and empty mean the default."""

    extension_id: str
    dataset_id: str
    held_out_dataset_id: str = ""
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 0
    learning_rate: float | None = None
    max_length: int = 0
    seed: int = 0
    gradient_accumulation_steps: int = 0
    lr_schedule: str = ""
    """cosine, linear or constant."""
    warmup_steps: int | None = None
    loraplus_lr_ratio: float | None = None
    weight_decay: float = 0.0
    precision: str = ""
    """fp32, bf16 or fp16."""
    gradient_checkpointing: bool = False
    evaluate_every: int = 0
    patience: int = 0
    devices: int = 0


@dataclass(frozen=True, slots=True)
class Training:
    """What a training job finds when it is claimed, for the first time or again."""

    wanted: NewTraining
    extension: Extension
    artifact_uri: str
    """Weights it began with."""
    checkpoint_uri: str | None = None
    """State to resume from."""
    loss_before: float | None = None
    """Held-out loss of the weights it began with, once it is measured."""
    result: Mapping[str, Any] | None = None
    """What it made, when it had finished before it was claimed again."""


@dataclass(frozen=True, slots=True)
class Sharer:
    """Another extension that computes with the same layers."""

    extension: Extension
    judged_by: NewTraining | None
    """Its last training, whose held-out rows judge it; None when it was never trained."""


@dataclass(frozen=True, slots=True)
class Documents:
    """A dataset's rows as token ids: texts, or pairs of prompt and target; never both."""

    texts: tuple[Sequence[int], ...] = ()
    pairs: tuple[tuple[Sequence[int], Sequence[int]], ...] = ()

    def __len__(self) -> int:
        return len(self.texts) + len(self.pairs)

    def held_out(self) -> tuple[Documents, Documents]:
        """(all but the last tenth, the last tenth), each with at least one row where there are two."""
        cut = len(self) - max(1, len(self) // 10)
        return Documents(self.texts[:cut], self.pairs[:cut]), Documents(self.texts[cut:], self.pairs[cut:])


@dataclass(frozen=True, slots=True)
class TrainedExtension:
    """What a training made."""

    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    seconds: float
    best_step: int
    """Step whose weights these are; fewer than `steps` when early stopping went back to the best."""
    shared: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the training of shared layers did to the others' own held-out losses: loss_before and loss_after by id."""
    model_id: str = ""
    """The new model, when the base was trained too."""

    def as_dict(self) -> dict[str, Any]:
        """The figures by name; what does not apply is left out."""
        figures = asdict(self)
        return {name: value for name, value in figures.items() if name not in ("shared", "model_id") or value}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An extension's loss beside its base's, nats per token."""

    extension_id: str
    base_loss: float
    loss: float
    tokens: int
    base_unchanged: bool
    """The base's logits are bit-equal before and after the measurement."""


@dataclass(frozen=True, slots=True)
class Switch:
    """What an activation or deactivation did."""

    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int
    active_extension_id: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A continuation that somebody asks for."""

    text: str
    max_new_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """A continuation."""

    text: str
    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Filter:
    """Which extensions are asked for."""

    model_id: str = ""
    task_name: str = ""
    limit: int = 50
    offset: int = 0
    page_token: str = ""
