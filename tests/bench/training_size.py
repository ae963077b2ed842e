"""Memory, loader and growth of our step, each measurement in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from services.training.compute import CoderPlan, InMemory, TrainConfig, Trainer
from services.training.compute.coder import Coder
from tests.bench.training_contestants import BATCH, DICT_SIZE, GROUPS, TOP_K, WIDTH, peak_bytes

SPEC_GROUPS = (2304, 4608, 9216, 20736)
SPEC_BATCH, SPEC_WIDTH = 2048, 2304
GROWTH = {
    "dict_size": (4096, 8192, 16_384, 32_768, 65_536),
    "batch_size": (512, 1024, 2048, 4096, 8192),
    "top_k": (16, 32, 64, 128, 256),
}


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` returns in a fresh process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def gemma_size(top_k: int, steps: int, threads: int) -> dict[str, Any]:
    """spec/002's own configuration on made-up rows of Gemma-2's width."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2 * SPEC_BATCH, SPEC_WIDTH, generator=generator) for _ in range(2))
    config = TrainConfig(
        dict_size=sum(SPEC_GROUPS),
        group_sizes=SPEC_GROUPS,
        top_k=top_k,
        batch_size=SPEC_BATCH,
        num_tokens=SPEC_BATCH * steps,
    )
    begin = time.perf_counter()
    trainer = Trainer(InMemory({"pair": (x, y)}), {"coder": CoderPlan("pair", config)})
    started = time.perf_counter() - begin
    seconds = [reports[0].seconds for reports in trainer.run()]
    return {"k": top_k, "start_s": started, "step_s": statistics.median(seconds), "peak_bytes": peak_bytes()}


def memory(rows: str, steps: int, threads: int) -> dict[str, Any]:
    """Peak resident bytes over what was held before, against weights, Adam's state and four pre-activations."""
    torch.set_num_threads(threads)
    with safe_open(rows, "pt") as found:
        x, y = (found.get_slice(name)[: 16 * BATCH].clone() for name in ("x", "y"))
    torch.mm(x[:BATCH], x[:BATCH].T)  # what a first product sets up is no part of the training
    before = peak_bytes()
    trainer = Trainer(InMemory({"pair": (x, y)}), {"coder": CoderPlan("pair", _config(num_tokens=steps * BATCH))})
    list(trainer.run())
    weights = 4 * DICT_SIZE * (2 * WIDTH + 1)
    bound = 1.5 * 3 * weights + 4 * 4 * BATCH * DICT_SIZE
    return {"over_bytes": peak_bytes() - before, "bound_bytes": bound, "peak_bytes": peak_bytes()}


def loader(rows: str, steps: int, threads: int) -> dict[str, Any]:
    """Part of the time that steps wait for rows of a mapped file."""
    torch.set_num_threads(threads)
    with safe_open(rows, "pt") as found:
        x, y = found.get_tensor("x"), found.get_tensor("y")
    trainer = Trainer(InMemory({"pair": (x, y)}), {"coder": CoderPlan("pair", _config(num_tokens=steps * BATCH))})
    trainer.step()
    waited, begin = trainer.waited_seconds, time.perf_counter()
    list(trainer.run())
    return {"loader_share": (trainer.waited_seconds - waited) / (time.perf_counter() - begin)}


def growth(field: str, value: int, steps: int, threads: int) -> dict[str, Any]:
    """Best step of a coder in which one number is another."""
    torch.set_num_threads(threads)
    config = {"dict_size": DICT_SIZE, "batch_size": BATCH, "top_k": TOP_K} | {field: value}
    parts = [config["dict_size"] * size // sum(GROUPS) for size in GROUPS]
    resolved = TrainConfig(**config, group_sizes=parts, num_tokens=config["batch_size"] * 1000).resolved(WIDTH)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(config["batch_size"], WIDTH, generator=generator) for _ in range(2))
    coder = Coder.start("growth", resolved, x, y)
    return {"milliseconds": 1e3 * min(coder.step(x, y).seconds for _ in range(steps))}


def grown(folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """Step time over D, B and k, printed, and plotted into the folder."""
    found: dict[str, dict[int, float]] = {}
    for field, values in GROWTH.items():
        found[field] = {}
        for value in values:
            found[field][value] = apart(growth, field, value, steps, threads)["milliseconds"]
            per = found[field][value] / value
            sys.stdout.write(f"{field:12s} {value:7d} {found[field][value]:9.1f} ms  {1e3 * per:8.2f} us each\n")
            sys.stdout.flush()
    (folder / "growth.json").write_text(json.dumps(found, indent=1))
    plotted(found, folder / "growth.png")
    return found


def plotted(found: dict[str, dict[int, float]], path: Path) -> None:
    """Three panels, milliseconds over what grows, with the straight line through the ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(12, 3.6))
    for panel, (field, times) in zip(panels, found.items(), strict=True):
        panel.plot(list(times), list(times.values()), "o-")
        ends = [min(times), max(times)]
        panel.plot(ends, [times[end] for end in ends], ":", color="grey")
        panel.set(xlabel=field, ylabel="ms a step", ylim=(0, None), xlim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def sizes(rows: Path, *, steps: int, threads: int, top_ks: Sequence[int] = (96, 192)) -> dict[str, Any]:
    """Memory bound, loader's share, and spec/002's configuration; printed."""
    found: dict[str, Any] = {"memory": apart(memory, str(rows), steps, threads)}
    sys.stdout.write(
        f"memory over the data {found['memory']['over_bytes'] / 1e6:.0f} MB, bound "
        f"{found['memory']['bound_bytes'] / 1e6:.0f} MB\n"
    )
    found["loader"] = apart(loader, str(rows), 4 * steps, threads)
    sys.stdout.write(f"waiting for rows {100 * found['loader']['loader_share']:.2f} % of the time (< 5)\n")
    for top_k in top_ks:
        found[f"gemma k {top_k}"] = one = apart(gemma_size, top_k, steps, threads)
        sys.stdout.write(
            f"d 2304, D 36864, k {top_k}: {one['step_s']:.2f} s a step, {one['peak_bytes'] / 1e9:.2f} GB at most "
            f"(24), start {one['start_s']:.1f} s\n"
        )
        sys.stdout.flush()
    return found


def _config(num_tokens: int) -> TrainConfig:
    return TrainConfig(dict_size=DICT_SIZE, group_sizes=GROUPS, top_k=TOP_K, batch_size=BATCH, num_tokens=num_tokens)
