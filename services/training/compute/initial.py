"""Where a coder starts: scales of its data and first weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.training.compute.config import TrainConfig
from services.training.compute.nested import Parameters

SAMPLE_ROWS = 16_384
"""Rows that the statistics are taken from, at most."""
RIDGE = 1e-2
"""Added to the input's covariance, whose mean diagonal is 1, before it is inverted."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Factors that bring the mean variance of a dimension to 1: x * source, y * target."""

    source: float
    target: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Scale:
        """Of rows x [N, d_in] and y [N, d_out]; 1 for data without variance."""
        return cls(_inverse_deviation(x), _inverse_deviation(y))


def initial_parameters(config: TrainConfig, scale: Scale, x: Tensor, y: Tensor) -> Parameters:
    """First weights, in scaled units, for a resolved configuration.

    Encoder rows are random directions, their biases centre them on mean(x); b_dec is mean(y). Decoder rows are where
    the linear regression of y on x sends the encoder's, at a length with which k of them together have about a tenth
    of the target's norm: at full length they would start as noise. Where decoder rows are to stay at length 1 the
    encoder's carry the length, five times as much: shorter ones turn away from all inputs before they have grown. A
    skip path starts as the regression itself.

    Args:
        config: resolved.
        scale: of the data.
        x: sample of rows, [N, d_in] float32.
        y: its targets, [N, d_out] float32.
    """
    x, y = x * scale.source, y * scale.target
    generator = torch.Generator().manual_seed(config.seed)
    W_enc = unit_rows(torch.randn(config.dict_size, x.shape[1], generator=generator).to(x.device))
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    covariance = centred.T @ centred / len(x) + RIDGE * torch.eye(x.shape[1], device=x.device)
    regression = torch.linalg.solve(covariance, centred.T @ (y - y_mean) / len(x))
    length = math.sqrt(y.shape[1] / config.shape.top_k) / 30
    W_dec = unit_rows(W_enc @ regression)
    if config.unit_norm_decoder:
        W_enc *= 5 * length
    else:
        W_dec *= length
    parameters = {
        "W_enc": W_enc,
        "b_enc": -(W_enc @ x_mean),
        "W_dec": W_dec,
        "b_dec": y_mean,
    }
    if config.skip:
        parameters["W_skip"] = regression.T.contiguous()
        parameters["b_dec"] = y_mean - x_mean @ regression
    return parameters


def unit_rows(matrix: Tensor) -> Tensor:
    """Rows of [n, d] at length 1."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _inverse_deviation(data: Tensor) -> float:
    variance = float(torch.var(data, dim=0, correction=0).mean(dtype=torch.float64))
    return 1 / math.sqrt(variance) if variance > 0 else 1.0
