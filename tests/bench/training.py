"""What a training step costs, against what it cannot cost less than: `python -m tests.bench.training`.

Rows d 256, dictionary 4096 in groups of 256, 512, 1024 and 2304, k 32, batches of 2048, two threads; every program gets
the same rows in the same order, one after the other in each round, and the median over the rounds is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from services.training.compute import TrainConfig
from services.training.compute.coder import Coder
from services.training.compute.nested import Parameters

WIDTH, DICT_SIZE, TOP_K, BATCH = 256, 4096, 32, 2048
GROUPS = (256, 512, 1024, 2304)


def rows(batches: int) -> list[tuple[Tensor, Tensor]]:
    """Sparse sums of fixed directions, so that codes are neither flat nor alike."""
    generator = torch.Generator().manual_seed(0)
    read, write = (torch.randn(1024, WIDTH, generator=generator) for _ in range(2))
    found = []
    for _ in range(batches):
        chosen = torch.rand(BATCH, 1024, generator=generator)
        features = chosen * (torch.rand(BATCH, 1024, generator=generator) < 0.02)
        found.append((features @ read, features @ write))
    return found


def started(groups: tuple[int, ...], data: list[tuple[Tensor, Tensor]], steps: int) -> Coder:
    config = TrainConfig(
        dict_size=DICT_SIZE, group_sizes=groups, top_k=TOP_K, batch_size=BATCH, num_tokens=steps * BATCH
    )
    return Coder.start("bench", config.resolved(WIDTH), *data[0])


def plain_autograd(coder: Coder) -> Callable[[Tensor, Tensor], None]:
    """The textbook's nested step: dense codes, a dense decode per group, autograd, fused Adam."""
    leaves: Parameters = {name: tensor.clone().requires_grad_() for name, tensor in coder.parameters.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-3, fused=True)
    edges = list(pairwise((0, *accumulate(GROUPS))))

    def step(x: Tensor, y: Tensor) -> None:
        pre = x @ leaves["W_enc"].T + leaves["b_enc"]
        values, indices = pre.topk(TOP_K, 1)
        z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        y_hat, loss = leaves["b_dec"], torch.zeros(())
        for start, end in edges:
            y_hat = y_hat + z[:, start:end] @ leaves["W_dec"][start:end]
            loss = loss + (y_hat - y).square().mean() / len(edges)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by program: `wall`, and `cpu`, which other programs on the machine disturb less."""
    data = rows(8)
    steps = 100 * rounds
    nested, single = started(GROUPS, data, steps), started((DICT_SIZE,), data, steps)
    weight = nested.parameters["W_enc"].clone()
    programs: dict[str, Callable[[Tensor, Tensor], object]] = {
        "encode": lambda x, _: x @ weight.T,
        "encode + top-k (floor)": lambda x, _: (x @ weight.T).topk(TOP_K, 1, sorted=False),
        "ours, 1 prefix": single.step,
        "ours, 4 prefixes": nested.step,
        "plain autograd, 4 prefixes": plain_autograd(nested),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        x, y = data[number % len(data)]
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            program(x, y)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {  # the first round warms up
        name: {clock: 1e3 * statistics.median(one[i] for one in found[1:]) for i, clock in enumerate(("wall", "cpu"))}
        for name, found in times.items()
    }


def ratios(found: dict[str, dict[str, float]], clock: str) -> dict[str, float]:
    """What the figures are compared by."""
    ours = found["ours, 4 prefixes"][clock]
    return {
        "ours / floor": ours / found["encode + top-k (floor)"][clock],
        "4 prefixes / 1 prefix": ours / found["ours, 1 prefix"][clock],
        "plain autograd / ours": found["plain autograd, 4 prefixes"][clock] / ours,
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = measured(options.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    compared = {clock: ratios(found, clock) for clock in ("wall", "cpu")}
    if options.json:
        sys.stdout.write(json.dumps({"milliseconds": found, "ratios": compared, "peak_resident_mb": peak}) + "\n")
        return
    for name, clocks in found.items():
        sys.stdout.write(f"{name:28s} {clocks['wall']:8.1f} ms wall {clocks['cpu']:8.1f} ms cpu\n")
    for name in compared["wall"]:
        sys.stdout.write(f"{name:28s} {compared['wall'][name]:8.2f}    wall {compared['cpu'][name]:8.2f}    cpu\n")
    sys.stdout.write(f"{'peak resident':28s} {peak:8.0f} MB\n")


if __name__ == "__main__":
    main()
