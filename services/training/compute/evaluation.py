"""Judge a transcoder on held-out text: what it leaves unexplained, and what the model loses when it takes over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.residency.families import Family
from services.residency.hooks import capture_hooks
from services.residency.lenses.transcoder import Transcoder
from services.residency.splice import Splice, logits, mean, next_token_loss, reconstruction, spliced, zeros
from services.training.compute.features import FeatureSampler
from services.training.compute.metrics import FvuAccumulator

DENSITY_BINS = 9
"""Firing frequencies from 10^-8 on, a bin a decade; the last one ends at 1."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an evaluation found; losses in nats per predicted token, sums over all batches in float64."""

    fvu: float
    """Of the groups that were used; see `metrics`."""
    fvu_per_prefix: list[float]
    fvu_standard_error: float
    """Over batches, of the batch's own FVU."""
    l0: float
    """Active latents per token."""
    l0_per_prefix: list[float]
    dead_fraction: float
    """Latents that were never active."""
    density_histogram: list[int]
    """Latents by firing frequency, see DENSITY_BINS; dead ones are in none."""
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    ce_recovered: float
    """(zero-ablated - spliced) / (zero-ablated - clean)."""
    ce_standard_error: float
    """Over batches, of what splicing adds to the loss."""
    kl: float
    """Mean divergence of the spliced prediction from the clean one, nats."""
    tokens: int
    """Tokens whose activations were compared."""
    batches: int


class Evaluation:
    """Two passes over the same batches: `read` all of them, then `score` all of them, then `result`.

    Each call is one batch's work on the device, so that a job can let others in between. Mean ablation needs the mean
    over the whole set, hence the two passes.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        transcoder: Transcoder,
        groups: int | None = None,
        sampler: FeatureSampler | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: the model the transcoder was trained on, in eval mode.
            family: its family.
            transcoder: its `info` names `source_hook_point` and `target_hook_point`; the rows come to its device, which
                is another one than the layer's where the model is spread over several.
            groups: use only that many groups of the dictionary.
            sampler: is shown every batch that `read` takes.

        Raises:
            ValueError: `prefix`: there are not that many groups.
        """
        transcoder.width(groups)
        self._sampler = sampler
        self._model, self._family, self._transcoder, self._groups = model, family, transcoder, groups
        self._device = transcoder.W_dec.device
        self._source = transcoder.reads
        self._target = str(transcoder.info["target_hook_point"])
        widths = transcoder.shape.prefix_widths
        self._used = len(widths) if groups is None else groups
        self._fvu = FvuAccumulator(self._used)
        self._fires = torch.zeros(transcoder.dict_size, dtype=torch.int64, device=self._device)
        self._batch_fvu: list[float] = []
        self._losses: list[dict[str, float]] = []
        self._predicted: list[int] = []

    def read(self, ids: Tensor, mask: Tensor, counted: Tensor) -> None:
        """Compare reconstructions of one batch; all [B, S], `counted` false on padding and special tokens."""
        chosen = counted.flatten().bool()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, tensor.shape[-1])[chosen.to(tensor.device)].to(self._device)

        with capture_hooks(self._model, self._family, (self._source, self._target)) as capture:
            found = capture.run(ids, mask, take=rows)
        x, y = found[self._source].float(), found[self._target].float()
        codes, y_hats = self._transcoder.prefixes(x)
        if self._groups is not None:
            codes = codes.prefix(self._transcoder.width(self._groups))
        self._fires += codes.counts()
        if self._sampler is not None:
            self._sampler.add(codes, ids, mask, counted)
        own = FvuAccumulator(self._used)
        for total in (self._fvu, own):
            total.add(y, y_hats[: self._used])
        if own.rows:
            self._batch_fvu.append(own.fvu()[-1])

    def score(self, ids: Tensor, mask: Tensor) -> None:
        """Losses of one batch: clean, with the reconstruction, with zeros and with the mean in place of the output."""
        splices: dict[str, Splice] = {
            "spliced": reconstruction(
                self._target, self._source, lambda x: self._transcoder(x.to(self._device), self._groups)
            ),
            "zero": zeros(self._target),
            "mean": mean(self._target, self._fvu.mean),
        }
        clean = logits(self._model, ids, mask)
        losses = {"clean": next_token_loss(clean, ids, mask)}
        kl = torch.zeros(0)
        for name, splice in splices.items():
            with spliced(self._model, self._family, [splice]):
                scores = logits(self._model, ids, mask)
            losses[name] = next_token_loss(scores, ids, mask)
            if name == "spliced":
                kl = _divergence(clean, scores, mask)
        self._losses.append(
            {name: float(loss.double().sum()) for name, loss in losses.items()} | {"kl": float(kl.double().sum())}
        )
        self._predicted.append(losses["clean"].numel())

    def result(self) -> Judgement:
        """The figures over all batches.

        Raises:
            ValueError: no batch had a token to compare, or none to predict.
        """
        predicted = sum(self._predicted)
        if not self._fvu.rows or not predicted:
            raise ValueError("the text has no token to evaluate on")
        fvu = self._fvu.fvu()
        per_latent = self._fires.double() / self._fvu.rows
        ends = self._transcoder.shape.prefix_widths[: self._used]
        ce = {name: sum(batch[name] for batch in self._losses) / predicted for name in self._losses[0]}
        added = [
            (batch["spliced"] - batch["clean"]) / tokens
            for batch, tokens in zip(self._losses, self._predicted, strict=True)
            if tokens
        ]
        width = ends[-1]
        return Judgement(
            fvu=fvu[-1],
            fvu_per_prefix=fvu,
            fvu_standard_error=_standard_error(self._batch_fvu),
            l0=float(per_latent.sum()),
            l0_per_prefix=[float(per_latent[:end].sum()) for end in ends],
            dead_fraction=float((self._fires[:width] == 0).double().mean()),
            density_histogram=_density(per_latent[:width]),
            ce_clean=ce["clean"],
            ce_spliced=ce["spliced"],
            ce_zero_ablated=ce["zero"],
            ce_mean_ablated=ce["mean"],
            ce_recovered=_recovered(ce["clean"], ce["spliced"], ce["zero"]),
            ce_standard_error=_standard_error(added),
            kl=ce["kl"],
            tokens=self._fvu.rows,
            batches=len(self._losses),
        )


def _divergence(clean: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """KL(clean || other) in nats at every unmasked position that predicts, [N] float32."""
    p, q = (scores[:, :-1].float().log_softmax(-1) for scores in (clean, other))
    divergence = (p.exp() * (p - q)).sum(-1)
    return divergence[mask[:, 1:].bool() & mask[:, :-1].bool()]


def _recovered(clean: float, spliced_: float, zero: float) -> float:
    """1 where splicing costs nothing, 0 where it costs as much as zeros; 1 where zeros cost nothing either."""
    return 1.0 if zero == clean else (zero - spliced_) / (zero - clean)


def _density(frequencies: Tensor) -> list[int]:
    alive = frequencies[frequencies > 0]
    bins = (alive.log10().floor() + DENSITY_BINS - 1).clamp(0, DENSITY_BINS - 1).long()
    return torch.bincount(bins, minlength=DENSITY_BINS).tolist()


def _standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))
