"""How each activation picks its codes while training, and how its thresholds follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import Encoder, select_above, select_topk
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.config import TrainConfig
from services.training.compute.nested import Parameters
from services.training.compute.ranks import Ranks

FOLLOW = 0.25
"""Weight of the newest estimate in the running threshold."""
PROBE_EVERY, PROBE_ROWS = 4, 256
"""How often, and on how many rows, a topk coder's threshold is estimated."""
LIKELY = 0.8
"""Part of the running threshold above which the next batch's strongest are looked for first."""
BANDWIDTH = 0.1
"""Width of the window around a threshold in which it gets a gradient; pre-activations start with variance 1."""
STEERING = 0.4, 0.1
"""How much of the way to top_k active latents the thresholds of a jumprelu coder go per step: always, and at the full
learning rate besides. Early they have far to fall, and the first alone would leave L0 too low in a short run; later the
second would follow every batch's chance."""
FACTORS = torch.logspace(-1, 1, 161, base=2)
"""By how much the thresholds may be asked to change at once."""


def encoder(config: TrainConfig, parameters: Parameters) -> Encoder:
    """The encoder in the number format of its product."""
    dtype = getattr(torch, config.dtype)
    return Encoder(parameters["W_enc"].to(dtype), parameters["b_enc"].to(dtype))


def select(config: TrainConfig, parameters: Parameters, threshold: Tensor, x: Tensor, ranks: Ranks) -> Codes:
    """Codes of a rank's rows x [N, d_in] with topk or batch_topk; values in float32. `threshold`: the running one."""
    x, k = x.to(getattr(torch, config.dtype)), config.shape.top_k
    if config.activation == "topk":
        codes = select_topk(encoder(config, parameters), x, k)
    else:
        codes = select_batch_topk(encoder(config, parameters), x, k, ranks, LIKELY * threshold)
    return Codes(codes.rows, codes.dict_size, codes.row, codes.latent, codes.value.float())


def follow_threshold(
    config: TrainConfig, parameters: Parameters, threshold: Tensor, *, step: int, x: Tensor, codes: Codes, ranks: Ranks
) -> Tensor:
    """The running threshold, a scalar tensor, after step `step`: the one under which L0 is top_k on average.

    It is what batch_topk selects by once trained, and the JumpReLU stand-in that other tools read for topk.

    Args:
        config: resolved.
        parameters: as the step leaves them.
        threshold: the one before.
        step: from 0.
        x: the step's rows of this rank, [N, d_in].
        codes: theirs.
        ranks: who holds the other rows.
    """
    if config.activation == "topk":
        if step % PROBE_EVERY:
            return threshold
        rows = x[:: max(1, config.batch_size // PROBE_ROWS)].to(getattr(torch, config.dtype))
        codes = select_batch_topk(encoder(config, parameters), rows, config.shape.top_k, ranks, LIKELY * threshold)
    newest = lowest(codes, ranks)
    return newest if step == 0 else threshold + FOLLOW * (newest - threshold)


def lowest(codes: Codes, ranks: Ranks) -> Tensor:
    """The smallest active value of all ranks, a float32 scalar; 0 when nothing is active."""
    some = codes.value.min().float() if len(codes) else codes.value.new_full((), torch.inf, dtype=torch.float32)
    least = ranks.least(some)
    return torch.where(least.isinf(), torch.zeros_like(least), least)


@dataclass(frozen=True, slots=True)
class Window:
    """JumpReLU's codes and what its thresholds need.

    Rajamanoharan et al. 2024 (arXiv:2407.14435), eq. 11: with K a box of width BANDWIDTH around the threshold t,
    d JumpReLU(z)/dt = -t K((z - t)/w)/w.

    Attributes:
        codes: entries above the window's lower edge; value 0 where they are below their threshold.
        near: their pre-activations, also where they are below it, [nnz].
        inside: bool [nnz], those inside the window.
    """

    codes: Codes
    near: Tensor
    inside: Tensor

    @classmethod
    def of(cls, config: TrainConfig, parameters: Parameters, x: Tensor) -> Window:
        """Of a batch x [N, d_in]."""
        threshold, dtype = parameters["threshold"], getattr(torch, config.dtype)
        edge = (threshold - BANDWIDTH / 2).to(dtype)
        near = select_above(encoder(config, parameters), x.to(dtype), edge)
        value, limit = near.value.float(), threshold[near.latent]
        active = ~(value <= limit)
        codes = Codes(near.rows, near.dict_size, near.row, near.latent, value * active)
        return cls(codes, value, (value - limit).abs() < BANDWIDTH / 2)

    def gradient(self, threshold: Tensor, by_value: Tensor) -> Tensor:
        """dL/dthreshold [D] from dL/dz of the entries, [nnz]."""
        each = -by_value * threshold[self.codes.latent] * self.inside / BANDWIDTH
        return torch.zeros_like(threshold).index_add_(0, self.codes.latent, each)

    def factor(self, threshold: Tensor, top_k: int, ranks: Ranks) -> float:
        """What all thresholds [D] are to be multiplied by for top_k active latents per row of the batch, of FACTORS.

        The published sparsity losses leave L0 to a coefficient that has to be searched for; here it is asked for.
        """
        factors = FACTORS.to(threshold.device)
        place = torch.bucketize(self.near / threshold[self.codes.latent], factors)
        counts = ranks.total(torch.bincount(place, minlength=len(factors) + 1))
        above = counts.flip(0).cumsum(0).flip(0)[1:].double()  # entries that each factor would leave
        wanted = float(ranks.world * self.codes.rows * top_k)
        last = int((above >= min(wanted, float(above[0]))).sum()) - 1  # of fewer than wanted the window shows no more
        if above[last] < wanted or last == len(factors) - 1:
            return float(factors[last])
        part = (above[last] - wanted) / (above[last] - above[last + 1])
        return float(factors[last] + part * (factors[last + 1] - factors[last]))


def steer(threshold: Tensor, factor: float, pace: float) -> None:
    """Move all thresholds [D] together, in place, by part of `factor`, as `Window.factor` gives it.

    `pace` is the step's learning rate as a part of the highest.
    """
    threshold.mul_(factor ** (STEERING[0] + STEERING[1] * pace))
