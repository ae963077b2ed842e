"""From one kind of transcoder to another: top-k to thresholds, whole to prefix, with the norm's gain and without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import BLOCK_ELEMENTS, Encoder
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.config import ConfigError

FITTED = 0.75
"""Part of the calibration rows that thresholds are fitted on to choose their kind; the rest decides."""
ALIKE = 1e-6
"""Pre-activations that differ by less, relatively, are those of rows that are alike: rounding decides their order."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A JumpReLU transcoder in place of another.

    Attributes:
        transcoder: with the same weights.
        thresholds: `scalar`, one for all latents; `per_latent`; or `stored`, those that the original had.
        wanted_l0: active latents per calibration row of the original; None without such rows.
        l0: the same of the new one.
    """

    transcoder: Transcoder
    thresholds: str
    wanted_l0: float | None = None
    l0: float | None = None


@torch.no_grad()
def to_jumprelu(transcoder: Transcoder, rows: Tensor | None) -> Calibrated:
    """A JumpReLU transcoder in place of a topk or batch_topk one.

    Two sets of thresholds give the original's L0 on the rows: one threshold for all latents, and for every latent the
    one above which it is active as often as it was. The one whose reconstructions are closer to the original's on
    rows it was not fitted on is taken, fitted on all of them. batch_topk is one threshold already, and jumprelu stays.

    Args:
        transcoder: what to convert; its stored thresholds are taken where there are no rows.
        rows: calibration inputs [N, d_in], N of several thousand for a dictionary of usual size.

    Raises:
        ConfigError: `calibrate`: the rows have another width, or are fewer than two.
    """
    activation = transcoder.shape.activation
    if rows is None or activation == "jumprelu":
        return Calibrated(_with_thresholds(transcoder, transcoder.threshold), "stored")
    if rows.ndim != 2 or rows.shape[1] != transcoder.d_in or len(rows) < 2:
        raise ConfigError("calibrate", f"shape {list(rows.shape)}, expected [2 or more, {transcoder.d_in}]")
    rows = rows.to(transcoder.W_enc)
    kind = "scalar" if activation == "batch_topk" else _better(transcoder, rows)
    codes = _original(transcoder, rows)
    converted = _with_thresholds(transcoder, _fitted(kind, transcoder, rows, codes))
    active = len(converted.encode_sparse(rows))
    return Calibrated(converted, kind, len(codes) / len(rows), active / len(rows))


def prefix_of(transcoder: Transcoder, groups: int) -> Transcoder:
    """The first groups of a JumpReLU transcoder as one of their own; a top-k would select differently.

    Raises:
        ValueError: `prefix`: there are not that many groups.
    """
    assert transcoder.shape.activation == "jumprelu", "only thresholds select a prefix as they did within the whole"
    width = transcoder.width(groups)
    weights = {
        "W_enc": transcoder.W_enc[:, :width],
        "b_enc": transcoder.b_enc[:width],
        "W_dec": transcoder.W_dec[:width],
        "b_dec": transcoder.b_dec,
        "threshold": transcoder.threshold[:width],
    }
    if transcoder.W_skip is not None:
        weights["W_skip"] = transcoder.W_skip
    shape = TranscoderShape("jumprelu", min(transcoder.shape.top_k, width), transcoder.shape.group_sizes[:groups])
    return Transcoder(shape, weights, transcoder.info)


def without_gain(W_enc: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder for an input that lacks the norm's gain, and what float32 lost of it; both [d_in, D] float32.

    x * gain @ W_enc = x @ (gain[:, None] * W_enc). The product of two float32 has at most 48 digits: the two parts
    hold it whole, and `with_gain` gives the same bits back.

    Args:
        W_enc: [d_in, D] float32.
        gain: [d_in], with which the input of W_enc was multiplied; 1 + weight in Gemma.

    Raises:
        ConfigError: `gain`: another shape, or a zero in it, which could not be undone.
    """
    exact = W_enc.double() * _checked(gain, len(W_enc))[:, None]
    rounded = exact.float()
    return rounded, (exact - rounded.double()).float()


def with_gain(W_enc: Tensor, gain: Tensor, lost: Tensor | None = None) -> Tensor:
    """The inverse: the encoder for an input that has the norm's gain applied, [d_in, D] float32.

    Raises:
        ConfigError: as `without_gain`.
    """
    exact = W_enc.double() if lost is None else W_enc.double() + lost.double()
    return (exact / _checked(gain, len(W_enc))[:, None]).float()


def _checked(gain: Tensor, width: int) -> Tensor:
    if gain.shape != (width,):
        raise ConfigError("gain", f"shape {list(gain.shape)}, expected [{width}]")
    if not bool(gain.isfinite().all()) or bool((gain == 0).any()):
        raise ConfigError("gain", "holds a zero or a value that is not finite")
    return gain.double()


def _with_thresholds(transcoder: Transcoder, threshold: Tensor) -> Transcoder:
    weights = {name: tensor for name, tensor in transcoder.state_dict().items() if tensor is not None}
    shape = TranscoderShape("jumprelu", transcoder.shape.top_k, transcoder.shape.group_sizes)
    return Transcoder(shape, weights | {"threshold": threshold}, transcoder.info)


def _original(transcoder: Transcoder, rows: Tensor) -> Codes:
    """What the thresholds have to reproduce; for batch_topk its selection over all rows, as it was trained."""
    if transcoder.shape.activation == "topk":
        return transcoder.encode_sparse(rows)
    return select_batch_topk(Encoder(transcoder.W_enc.T, transcoder.b_enc), rows, transcoder.shape.top_k)


def _better(transcoder: Transcoder, rows: Tensor) -> str:
    fitted, others = rows.split([cut := max(1, int(len(rows) * FITTED)), len(rows) - cut])
    codes, wanted = _original(transcoder, fitted), transcoder(others)
    missed = {
        kind: float(
            (_with_thresholds(transcoder, _fitted(kind, transcoder, fitted, codes))(others) - wanted)
            .square()
            .sum(dtype=torch.float64)
        )
        for kind in ("scalar", "per_latent")
    }
    return min(missed, key=lambda kind: missed[kind])


def _fitted(kind: str, transcoder: Transcoder, rows: Tensor, codes: Codes) -> Tensor:
    """Thresholds [D] under which as many entries are active on `rows` as in `codes`, in all or of each latent."""
    if kind == "per_latent":
        return _per_latent(transcoder, rows, codes.counts())
    return _scalar(transcoder, rows, len(codes)).expand(transcoder.dict_size)


def _scalar(transcoder: Transcoder, rows: Tensor, active: int) -> Tensor:
    """Half-way between the `active` largest positive pre-activations of all rows and the next one."""
    encoder = Encoder(transcoder.W_enc.T, transcoder.b_enc)
    per_row = -(-active // len(rows))
    values = select_batch_topk(encoder, rows, min(per_row + 1, transcoder.dict_size)).value.sort(descending=True).values
    if not active:
        return values[:1].amax() if len(values) else rows.new_zeros(())
    below = values[active] if active < len(values) else values.new_zeros(())
    return (values[active - 1] + below) / 2


def _per_latent(transcoder: Transcoder, rows: Tensor, counts: Tensor) -> Tensor:
    """For each latent, half-way between its `counts` largest positive pre-activations and the next one.

    Rows that are alike cannot be told apart: then all of them are in or all out, such that the sum over latents fits.
    """
    thresholds = torch.empty_like(transcoder.b_enc)
    step, missing = max(1, BLOCK_ELEMENTS // len(rows)), 0
    for start in range(0, transcoder.dict_size, step):
        part = slice(start, start + step)
        own = counts[part, None]
        pre = torch.addmm(transcoder.b_enc[part], rows, transcoder.W_enc[:, part]).T.clamp_min(0)
        ordered = pre.topk(min(int(own.max()) + 1, len(rows)), dim=1).values
        ordered = torch.nn.functional.pad(ordered, (0, 1))  # below the last row there is nothing
        lowest, following = ordered.gather(1, (own - 1).clamp_min(0)), ordered.gather(1, own)
        found = torch.where(own > 0, (lowest + following) / 2, lowest)[:, 0]
        tied = ((own > 0) & (lowest - following <= ALIKE * lowest))[:, 0].nonzero()[:, 0]
        low, high = (lowest[tied] * (1 - 2 * ALIKE), lowest[tied] * (1 + 2 * ALIKE))
        fewer, more = ((pre[tied] > bound).sum(1).tolist() for bound in (high, low))
        for place, wanted, least, most in zip(tied.tolist(), own[tied, 0].tolist(), fewer, more, strict=True):
            missing += wanted
            everything = abs(missing - most) < abs(missing - least)
            found[place] = lowest[place, 0] * (1 - 2 * ALIKE if everything else 1 + 2 * ALIKE)
            missing -= most if everything else least
        thresholds[part] = found
    return thresholds
