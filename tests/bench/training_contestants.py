"""What every program in the training benchmark is asked for; imports nothing of ours: peers run it, too."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

GROUPS = (256, 512, 1024, 2304)
WIDTHS = tuple(accumulate(GROUPS))
DICT_SIZE, TOP_K, BATCH, WIDTH = 4096, 32, 2048, 256


@dataclass(frozen=True)
class Race:
    """What a contestant is started with."""

    steps: int
    """It will make at most."""
    x: Tensor
    """First rows of the data [N, 256], for statistics."""
    y: Tensor
    learning_rate: float | None = None
    """Instead of its own rule."""
    dict_size: int = DICT_SIZE
    top_k: int = TOP_K


class Contestant(Protocol):
    """A program that trains."""

    def step(self, x: Tensor, y: Tensor) -> object:
        """One whole step, optimiser included, on x, y [N, 256]."""
        ...

    def codes(self, x: Tensor) -> Tensor:
        """Dense codes [N, D] as it selects them when trained."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruction [N, 256] from codes like those; called after `codes`."""
        ...


class Plain:
    """The textbook's step: dense codes, a dense decode per prefix, autograd, Adam; also without nesting."""

    def __init__(self, race: Race, widths: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self._widths, self._top_k, self._step, self._steps = widths, race.top_k, 0, race.steps
        weight = torch.randn(race.dict_size, WIDTH)
        weight /= weight.norm(dim=1, keepdim=True)
        self._scale = (race.x.var(0).mean().rsqrt(), race.y.var(0).mean().rsqrt())
        x, y = race.x * self._scale[0], race.y * self._scale[1]
        self._weights = [weight, -(weight @ x.mean(0)), torch.zeros(race.dict_size, WIDTH), y.mean(0)]
        for tensor in self._weights:
            tensor.requires_grad_()
        rate = race.learning_rate or 2e-4 / math.sqrt(race.dict_size / 2**14)
        self._optimizer = torch.optim.Adam(self._weights, lr=rate, fused=True)

    def step(self, x: Tensor, y: Tensor) -> object:
        x, y = x * self._scale[0], y * self._scale[1]
        codes, w_dec, y_hat, loss = self._codes(x), self._weights[2], self._weights[3], torch.zeros(())
        for start, end in pairwise((0, *self._widths)):
            y_hat = y_hat + codes[:, start:end] @ w_dec[start:end]
            loss = loss + (y_hat - y).square().mean() / len(self._widths)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _codes(self, x: Tensor) -> Tensor:
        pre = torch.addmm(self._weights[1], x, self._weights[0].T)
        values, indices = pre.topk(self._top_k, 1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x * self._scale[0])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return (codes @ self._weights[2] + self._weights[3]) / self._scale[1]


class Product:
    """The encoder's product and nothing else, or with the top-k: what a step cannot cost less than."""

    def __init__(self, race: Race, *, top_k: bool) -> None:
        self._weight, self._top_k = torch.randn(race.dict_size, WIDTH), race.top_k if top_k else 0

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> object:
        pre = x @ self._weight.T
        return pre.topk(self._top_k, 1, sorted=False) if self._top_k else pre


REFERENCES: dict[str, Callable[[Race], Any]] = {
    "encoder product": lambda race: Product(race, top_k=False),
    "encode + top-k": lambda race: Product(race, top_k=True),
    "plain autograd": lambda race: Plain(race, WIDTHS),
    "plain autograd, 1 prefix": lambda race: Plain(race, WIDTHS[-1:]),
}


def batches(x: Tensor, y: Tensor, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for everyone, pass after pass in another order, from batch `first` on."""
    rows, number = len(x) // BATCH * BATCH, first
    while True:
        done, position = divmod(number * BATCH, rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(done))
        for start in range(position, rows, BATCH):
            index = order[start : start + BATCH].sort().values  # in the file's order: it is mapped
            yield x[index], y[index]
            number += 1


def strongest_first(contestant: Contestant, x: Tensor) -> Tensor:
    """Latents by how much they add to the reconstruction of x [N, 256] in all, int64 [D]: the best order to cut in."""
    used = sum(contestant.codes(part).square().sum(0) for part in x.split(BATCH))
    rows = contestant.decode(torch.eye(DICT_SIZE)) - contestant.decode(torch.zeros(1, DICT_SIZE))
    return (used * rows.square().sum(1)).argsort(descending=True)


def judged(contestant: Contestant, x: Tensor, y: Tensor, order: Tensor | None = None) -> dict[str, Any]:
    """FVU of every prefix over rows x, y in float64, L0, and the part of the latents that no row activates.

    With an `order`, int64 [D], a prefix is its first latents, whatever their numbers are.
    """
    place = torch.arange(DICT_SIZE) if order is None else order.argsort()
    errors, active, l0 = [0.0] * len(WIDTHS), torch.zeros(DICT_SIZE, dtype=torch.bool), 0.0
    for start in range(0, len(x), BATCH):
        codes = contestant.codes(x[start : start + BATCH])
        l0 += float((codes > 0).sum())
        active |= (codes > 0).any(0)
        target = y[start : start + BATCH].double()
        for number, width in enumerate(WIDTHS):
            y_hat = contestant.decode(codes * (place < width))
            errors[number] += float((y_hat.double() - target).square().sum())
    variance = float((y.double() - y.double().mean(0)).square().sum())
    return {
        "fvu_per_prefix": [error / variance for error in errors],
        "l0": l0 / len(x),
        "dead": float((~active).double().mean()),
    }


def timed(contestant: Contestant, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(steps):
        x, y = next(data)
        begin = time.perf_counter()
        contestant.step(x, y)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_bytes() -> int:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
