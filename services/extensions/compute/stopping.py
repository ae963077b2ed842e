"""Early stopping on the held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class EarlyStopping:
    """Held-out losses of one training; with patience it keeps the best weights and says when to stop."""

    def __init__(self, patience: int) -> None:
        """Begin; `patience` losses in a row that are no better than the best end the training, 0 never does."""
        self.judged_at = 0
        """Step of the last held-out loss."""
        self.best: float | None = None
        """Lowest held-out loss so far, nats per token."""
        self.best_step = 0
        self.best_weights: dict[str, torch.Tensor] = {}
        """The weights that gave it; empty without patience."""
        self._patience = patience
        self._waited = 0

    @property
    def due(self) -> bool:
        """Patience has run out."""
        return 0 < self._patience <= self._waited

    def judged(self, step: int, loss: float, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Note a held-out loss; `weights` copies the weights that gave it."""
        self.judged_at = step
        if self.best is not None and loss >= self.best:
            self._waited += 1
            return
        self.best, self.best_step, self._waited = loss, step, 0
        if self._patience:
            self.best_weights = weights()

    def forget(self) -> None:
        """Begin again: what is trained has grown since the best loss."""
        self.best, self.best_step, self._waited, self.best_weights = None, 0, 0, {}

    def facts(self) -> dict[str, Any]:
        """All but the weights, as plain JSON."""
        return {"judged_at": self.judged_at, "best": self.best, "best_step": self.best_step, "waited": self._waited}

    def restore(self, facts: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        """Continue where `facts` were taken."""
        self.judged_at, self.best, self.best_step = facts["judged_at"], facts["best"], facts["best_step"]
        self._waited = facts["waited"]
        self.best_weights = {key: weight.clone() for key, weight in weights.items()}
