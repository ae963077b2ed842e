"""What a service and its training process say to each other: one JSON object a line, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Start:
    """First line to the process."""

    plan: Mapping[str, Any]
    """`Plan.as_json`, settled."""
    device: str
    """As torch names it in each rank."""
    ranks: Sequence[str] = ("cpu",)
    """Device of each rank, as `gang.program` takes it."""
    threads: int = 1
    """CPU threads of each rank."""
    cache: str = ""
    """Directory of the activation cache; none where no step is to be made."""
    state: str = ""
    """Directory of the checkpoint to go on from; none at the beginning."""


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
class Gone:
    """From the process: it cannot go on, and ends."""

    reason: str
    """Name of an ErrorReason."""
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    transient: bool = False


Command = Start | Save | Write
Message = Progress | Saved | Finished | Written | Gone
_KINDS: dict[str, type[Command | Message]] = {
    kind.__name__: kind for kind in (Start, Save, Write, Progress, Saved, Finished, Written, Gone)
}


def to_line(said: Command | Message) -> bytes:
    """One line, with its end."""
    return json.dumps([type(said).__name__, asdict(said)], default=_plain).encode() + b"\n"


def from_line(line: bytes) -> Any:
    """What `to_line` was given.

    Raises:
        ValueError: it is no such line.
    """
    try:
        kind, values = json.loads(line)
        return _KINDS[kind](**values)
    except (KeyError, TypeError) as error:
        raise ValueError("not a line of ours") from error


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value).__name__)
