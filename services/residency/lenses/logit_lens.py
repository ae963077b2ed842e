"""The logit lens: every layer's residual stream through the final norm and the unembedding (nostalgebraist, 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.residency.families import base_model, blocks, hook_points, submodule
from services.residency.lenses import Base, LensIncompatible, Probability, Reading, Spec, TokenReading
from services.residency.splice import Splice


def most_probable(logits: Tensor, top_k: int) -> list[list[Probability]]:
    """The top_k tokens of each row of logits [N, vocab], most probable first."""
    values, indices = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
    return [
        [Probability(token, probability) for token, probability in zip(*row, strict=True)]
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


class LogitLens:
    """Reads all layers; owns no memory."""

    altering = False

    @property
    def nbytes(self) -> int:
        """Nothing of its own."""
        return 0

    def __init__(self, base: Base) -> None:
        if base.family is None:
            raise LensIncompatible("a family with hook points", "decoder-only", base.facts.model_type)
        self._base = base
        layers = [layer for layer in blocks(base.model, base.family) if isinstance(layer, int)]
        self._points: dict[str, int] = dict(zip(hook_points(["resid_post"], layers), layers, strict=True))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """None of its own."""
        return ()

    @property
    def hook_points(self) -> Sequence[str]:
        """The residual stream after every layer."""
        return list(self._points)

    def unembed(self, residual: Tensor) -> Tensor:
        """Logits [..., vocab] of a residual stream [..., d] at any layer, by the model's own last steps."""
        model, family = base_model(self._base.model), self._base.family
        assert family is not None, "checked when the lens was made"
        logits = submodule(model, family.unembedding)(submodule(model, family.final_norm)(residual))
        cap = getattr(model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def translated(self, layer: int, residual: Tensor) -> Tensor:
        """The stream after a layer, as it is."""
        return residual

    def read(
        self,
        activations: Mapping[str, Tensor],
        input_ids: Tensor,
        top_k: int,
        prefix: int,
        changes: Sequence[Splice] = (),
    ) -> Reading:
        """The next-token distribution read after each layer; the last layer's is the model's own."""
        tokens = [TokenReading() for _ in range(input_ids.shape[1])]
        with torch.no_grad():
            for point, layer in self._points.items():
                rows = most_probable(self.unembed(self.translated(layer, activations[point]))[0], top_k)
                for token, predictions in zip(tokens, rows, strict=True):
                    token.layers.append((layer, predictions))
        return Reading(tokens)

    def move(self, device: str) -> None:
        """Nothing to move: it reads through the base's own weights."""

    def detach(self) -> None:
        """Nothing to take back."""

    def attach(self) -> None:
        """Nothing to put back."""


def load(spec: Spec, base: Base) -> LogitLens:
    """A logit lens on the base; it has no files.

    Raises:
        LensIncompatible: the model has no hook points.
    """
    return LogitLens(base)
