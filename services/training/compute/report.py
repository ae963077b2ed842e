"""What one training step tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StepReport:
    """Figures of one coder after one step; FVU and L0 are those of the step's own batch, before its update."""

    coder: str
    """Which coder, when several are trained from one stream."""
    step: int
    """Steps done, this one included."""
    tokens_seen: int
    """Rows trained on, this step's included."""
    seconds: float
    """Time this coder's step took, without reading the batch."""
    tokens_per_second: float
    """Rows of this step over its seconds."""
    learning_rate: float
    """The rate it used."""
    loss: float
    """l2_loss + aux_weight * aux_loss."""
    l2_loss: float
    """Weighted mean over prefixes of the mean square error, in units in which the target's variance is about 1."""
    aux_loss: float
    """What the dead latents leave of the residual, as a fraction of its variance; 0 while none is dead."""
    fvu_per_prefix: Sequence[float]
    """Error of each prefix over the batch's own variance, smallest prefix first."""
    l0_per_prefix: Sequence[float]
    """Active latents per row within each prefix."""
    dead_fraction: float
    """Part of the latents that were not active for `dead_after_tokens` rows."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    share: float = 1.0
    """Its seconds, as a part of the step's over all coders of the stream, reading the batch included."""
    coder_tokens_per_second: float = 0.0
    """Rows times coders over the step's seconds: what the whole stream trains."""
    fvu: float = field(init=False)
    """Of the whole dictionary."""
    fvu_min: float = field(init=False)
    """Of the best prefix."""
    fvu_max: float = field(init=False)
    """Of the worst prefix."""
    fvu_mean: float = field(init=False)
    """Mean over prefixes."""
    l0: float = field(init=False)
    """Active latents per row."""

    def __post_init__(self) -> None:
        prefixes = self.fvu_per_prefix
        object.__setattr__(self, "fvu", prefixes[-1])
        object.__setattr__(self, "fvu_min", min(prefixes))
        object.__setattr__(self, "fvu_max", max(prefixes))
        object.__setattr__(self, "fvu_mean", sum(prefixes) / len(prefixes))
        object.__setattr__(self, "l0", self.l0_per_prefix[-1])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)
