"""What the service and the processes that train an extension together say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.residency.lines import Words

Action = Literal["step", "judged", "settle", "state", "weights"]


@dataclass(frozen=True, slots=True)
class Start:
    """First line to the processes; answered by `Done` when they are ready."""

    model: str
    """Directory of the base's files."""
    quantization: str
    extension: str
    """Directory of the extension's files."""
    examples: str
    """File of `Examples.save`."""
    settings: Mapping[str, Any]
    """Fields of `TrainSettings`."""
    ranks: Sequence[str]
    """Device of each process, as `gang.program` takes it."""
    state: str = ""
    """Directory of the checkpoint to go on from; none at the beginning."""


@dataclass(frozen=True, slots=True)
class Do:
    """To the processes; answered by `Done`.

    `step` makes one, `judged` notes a held-out loss, `settle` takes the best weights, `state` and `weights` write what
    to go on from and the extension's files into an empty directory.
    """

    action: Action
    held_out: float = 0.0
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """From the processes: it is done."""

    standing: Mapping[str, Any]
    """Fields of `Standing`."""
    report: Mapping[str, Any] | None = None
    """Fields of the step's `StepReport`."""


WORDS = Words(Start, Do, Done)
