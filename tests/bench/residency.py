"""Load, quantise, park, restore and switch, each against the floor of reading the same bytes.

    python -m tests.bench.residency [--megabytes 512] [--repeat 5]
    python -m tests.bench.residency --cycles 100 [--curve memory.png]     # what loading and unloading leaves behind

The floor is `safetensors.torch.load_file` plus a clone of every tensor; the fingerprint is timed apart.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from services.residency.disk_cache import DiskCache
from services.residency.fingerprint import fingerprint
from services.residency.lenses import Spec
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.loading import fill, load_model, prepare
from services.residency.memory import give_back, keep_freed
from services.residency.pool import Pool
from tests.models import tokenizer

QUANTIZATIONS = ("none", "int8", "int4")
WARM_UP = 6
"""Cycles before those that are counted, two of each quantization."""


def synthetic(path: Path, megabytes: int) -> None:
    """A random bfloat16 Llama of about this size, made of layers of 16 MB."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=max(1, (megabytes - 16) // 20),
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer().save_pretrained(path)


class Rounds:
    """Times each step in turns with the floor, so that a machine's moods meet both; freed memory is returned before."""

    def __init__(self, pool: Pool, files: list[Path], repeat: int) -> None:
        self._pool, self._files, self._repeat = pool, files, repeat
        self.floors: list[float] = []
        self.rows: list[tuple[str, float, float]] = []
        """Step, median seconds, median of the rounds' ratios to the floor."""

    async def add(
        self, name: str, work: Callable[[], Awaitable[object]], after: Callable[[], Awaitable[object]]
    ) -> None:
        """Measure `work`, with `after` untimed behind each."""
        seconds, ratios = [], []
        for _ in range(self._repeat):
            bare = await timed(lambda: self._pool.run(floor, self._files))
            seconds.append(await timed(work))
            ratios.append(seconds[-1] / bare)
            self.floors.append(bare)
            await after()
        self.rows.append((name, statistics.median(seconds), statistics.median(ratios)))


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """Seconds of `work` in a process that holds no freed memory."""
    give_back("cpu")
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


def floor(files: list[Path]) -> list[torch.Tensor]:
    """All clones are held until the last is made, as a model holds them: freed ones would be handed out again."""
    return [tensor.clone() for file in files for tensor in load_file(file).values()]


async def nothing() -> None:
    pass


def lens(folder: Path, width: int, seed: int) -> Spec:
    make = torch.Generator().manual_seed(seed)
    weights = {
        "W_enc": torch.randn(width, 16 * width, generator=make),
        "b_enc": torch.zeros(16 * width),
        "W_dec": torch.randn(16 * width, width, generator=make),
        "b_dec": torch.zeros(width),
        "threshold": torch.zeros(16 * width),
    }
    groups = (width, 2 * width, 4 * width, 9 * width)
    Transcoder(TranscoderShape("topk", 64, groups), weights, {"layer": 0}).save(folder)
    return Spec(f"lens-{seed}", "transcoder", folder)


async def measure(path: Path, files: list[Path], repeat: int) -> list[tuple[str, float, float]]:
    pool = Pool("cpu", 1 << 40, 1 << 40)
    rounds = Rounds(pool, files, repeat)

    async def reading(quantization: str) -> None:
        await pool.run(load_model, path, quantization)

    await reading("none")  # imports
    for quantization in QUANTIZATIONS:
        await rounds.add(f"weights as {quantization}", lambda q=quantization: reading(q), nothing)

    async def load() -> None:
        await pool.load("m", path, "none")

    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(Path(folder) / "quantized", Path(folder) / "hub", 1 << 40)
        for quantization in ("int8", "int4"):
            cache.keep(load_model(path, quantization), "digest", quantization, "cpu")

            async def again(quantization: str = quantization) -> None:
                kept = cache.find("digest", quantization, "cpu")
                await pool.run(lambda: fill(prepare(path, quantization), "cpu", lambda done, total: None, kept))

            await rounds.add(f"{quantization} from the disk cache", again, nothing)
    await rounds.add("pool.load: weights, fingerprint, tokenizer", load, lambda: pool.unload("m"))
    resident = await pool.load("m", path, "none")
    await rounds.add("fingerprint", lambda: pool.run(fingerprint, resident.base.model), nothing)
    await rounds.add("park", lambda: pool.park("m"), lambda: pool.restore("m"))
    await pool.park("m")
    await rounds.add("restore, fingerprint included", lambda: pool.restore("m"), lambda: pool.park("m"))

    async def across(old: str, new: str) -> None:
        await pool.park(old)
        await pool.restore(new)

    await pool.load("n", path, "none")
    await rounds.add("switch to another group", lambda: across("n", "m"), lambda: across("m", "n"))
    await pool.unload("n")
    await pool.restore("m")
    bare = statistics.median(rounds.floors)
    with tempfile.TemporaryDirectory() as folder:
        specs = [lens(Path(folder) / str(seed), resident.base.facts.hidden_size, seed) for seed in (1, 2)]
        attached = [await timed(lambda one=one: pool.attach("m", one)) for one in specs]
        rounds.rows.append(("attach a lens", min(attached), min(attached) / bare))
    switch = statistics.median([await pool.switch("m", specs[turn % 2].lens_id) for turn in range(100)])
    rounds.rows.append(("switch within the group", switch, switch / bare))
    await pool.close()
    return [("floor: load_file and clone", bare, 1.0), *rounds.rows]


async def cycles(path: Path, count: int) -> list[float]:
    """Resident MB of this process after each load, park, restore and unload; the first entry is before any.

    What is imported and allocated once is no leak: the first `WARM_UP` cycles are not among them.
    """
    pool = Pool("cpu", 1 << 40, 1 << 40)
    process = psutil.Process()
    found = []
    for turn in range(WARM_UP + count):
        if turn >= WARM_UP:
            found.append(process.memory_info().rss / 1e6)
        await pool.load("m", path, QUANTIZATIONS[turn % len(QUANTIZATIONS)])
        await pool.park("m")
        await pool.restore("m")
        await pool.unload("m")
    found.append(process.memory_info().rss / 1e6)
    await pool.close()
    return found


def draw(found: list[float], file: Path) -> None:
    """The curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    low, high = found[0] * 0.99, found[0] * 1.01
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(found)
    axes.axhspan(low, high, alpha=0.2, label="1 %")
    ylim = (min(low, *found) - 0.01 * found[0], max(high, *found) + 0.01 * found[0])
    axes.set(xlabel="loads, parks, restores and unloads", ylabel="resident MB", ylim=ylim)
    axes.legend()
    figure.savefig(file, dpi=120)


def report_cycles(path: Path, count: int, curve: Path) -> None:
    """Print the drift, and draw it."""
    found = asyncio.run(cycles(path, count))
    draw(found, curve)
    first, furthest = found[0], max(found, key=lambda each: abs(each - found[0]))
    Console().print(
        f"{first:.1f} MB after {WARM_UP} cycles, {found[-1]:.1f} MB after {count} more: {found[-1] / first - 1:+.2%}; "
        f"furthest {furthest:.1f} MB: {furthest / first - 1:+.2%}",
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the synthetic model")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of each step; the median counts")
    parser.add_argument("--cycles", type=int, default=0, help="only load and unload so often, and draw the memory")
    parser.add_argument("--curve", type=Path, default=Path("memory.png"), help="where the picture goes")
    arguments = parser.parse_args()
    keep_freed()  # as a device process does
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        synthetic(Path(folder), arguments.megabytes)
        if arguments.cycles:
            report_cycles(Path(folder), arguments.cycles, arguments.curve)
            return
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        rows = asyncio.run(measure(Path(folder), files, arguments.repeat))
    table = Table("step", "seconds", "of the floor", title=f"{size / 1e6:.0f} MB of bfloat16 weights, CPU")
    for name, seconds, ratio in rows:
        table.add_row(name, f"{seconds:.4f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
