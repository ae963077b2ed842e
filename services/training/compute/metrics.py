"""The fraction of variance unexplained, one definition for training, evaluation and tests.

FVU = sum ||y - y_hat||^2 / sum ||y - y_mean||^2, y_mean the mean of every dimension over the whole set; sums in
float64. Predicting the mean gives exactly 1, a constant error is counted, a shift of all y changes nothing, and how the
set was cut into batches does not matter (Gemma Scope's definition, arXiv:2408.05147, section 4; SAELens' issues 443,
659 and SAEBench's 61 tell what the other ones cost).
"""

from __future__ import annotations

from torch import Tensor


def compute_fvu(x_original: Tensor, x_reconstruct: Tensor) -> float:
    """FVU of reconstructions [..., d] of originals [..., d]; leading dimensions are rows.

    Without any variance it is 0 for a perfect reconstruction and infinite for any other.

    Raises:
        ValueError: the shapes differ, or there are no rows.
    """
    if x_original.shape != x_reconstruct.shape:
        raise ValueError(f"x_reconstruct: {list(x_reconstruct.shape)}, expected {list(x_original.shape)}")
    total = FvuAccumulator(1)
    total.add(x_original.flatten(0, -2), x_reconstruct.flatten(0, -2)[None])
    return total.fvu()[0]


class FvuAccumulator:
    """Streaming FVU of several reconstructions of the same rows, for example one per prefix.

    Means and squares are merged by Chan's parallel update, so that a large common offset loses no digits.
    """

    def __init__(self, reconstructions: int) -> None:
        self.rows = 0
        self._mean: Tensor | None = None
        self._variance_sum = 0.0
        self._error_sums = [0.0] * reconstructions

    def add(self, y: Tensor, y_hats: Tensor) -> None:
        """Take rows y [N, d] and their reconstructions [reconstructions, N, d]."""
        if not len(y):
            return
        exact = y.double()
        mean = exact.mean(0)
        self._variance_sum += float((exact - mean).pow_(2).sum())
        if self._mean is None:
            self._mean = mean
        else:
            apart, rows = mean - self._mean, self.rows + len(y)
            self._variance_sum += float(apart.pow(2).sum()) * self.rows * len(y) / rows
            self._mean = self._mean + apart * (len(y) / rows)
        self.rows += len(y)
        for i, y_hat in enumerate(y_hats):
            self._error_sums[i] += float((exact - y_hat).pow_(2).sum())

    def fvu(self) -> list[float]:
        """FVU of each reconstruction over all rows so far.

        Raises:
            ValueError: there are no rows.
        """
        if not self.rows:
            raise ValueError("x_original: no rows")
        return [_ratio(error, self._variance_sum) for error in self._error_sums]

    @property
    def mean(self) -> Tensor:
        """float64 [d]: the mean row so far, what mean ablation puts in place of y."""
        assert self._mean is not None, "asked for the mean of no rows"
        return self._mean


def _ratio(error: float, variance: float) -> float:
    if variance == 0:
        return 0.0 if error == 0 else float("inf")
    return error / variance
