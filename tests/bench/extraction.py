"""Extraction against its floor, as ratios of one run: `python -m tests.bench.extraction [MODEL_DIR] [--tokens N]`.

The floor is a bare forward pass of the same batches, cut off behind the deepest hook point by a model that has no
further layers: no hooks, no copies, nothing written. Each contestant runs in turn, several rounds, and the medians are
compared, so that a machine's moods meet all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from services.extraction.adapters.files import WorkFolder
from services.extraction.compute import Moments, Plan, fill_units, make_plan
from services.residency.families import family_of, hook_points
from services.residency.texts import Sequences

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
ROUNDS = 5


def random_sequences(lengths: np.ndarray, vocab_size: int) -> Sequences:
    """Random token ids of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(0).integers(1, vocab_size, offsets[-1], dtype=np.int32)
    return Sequences(ids, offsets, np.arange(len(lengths)), len(lengths), 0, 0, 0)


def truncated(model: nn.Module, layers: int) -> nn.Module:
    """The model's body with its first `layers` blocks only."""
    short = copy.deepcopy(model)
    family = family_of(short)
    container = short.get_submodule(family.blocks)
    del container[layers:]
    path, _, name = family.final_norm.rpartition(".")
    setattr(short.get_submodule(path), name, nn.Identity())
    return short.base_model


@torch.inference_mode()
def floor(body: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Forward passes and nothing else; full batches without a mask, as the engine runs them."""
    for ids, mask in batches:
        padded = not bool(mask.all())
        body(input_ids=ids, use_cache=False, **({"attention_mask": mask} if padded else {}))


def extract(model: nn.Module, sequences: Sequences, plan: Plan, points: list[str], folder: Path) -> None:
    """Everything a worker does with tensors and files: capture, shuffle, sum up, write, flush, hash."""
    work = WorkFolder(folder, "bench")
    work.open("")
    writing: Future | None = None

    def write(unit: int, tensors: dict[str, torch.Tensor], moments: dict[str, Moments]) -> None:
        sums: dict[str, torch.Tensor] = {}
        for name, found in moments.items():
            sums |= found.tensors(name)
        work.write(unit, 1, tensors, sums)

    with ThreadPoolExecutor(1) as executor:
        for unit, tensors, moments in fill_units(model, sequences, plan, hook_points=points, dtype=torch.float32):
            if writing is not None:
                writing.result()
            writing = executor.submit(write, unit.index, tensors, moments)
        if writing is not None:
            writing.result()
    work.discard()


def seconds(*contestants: Callable[[], None]) -> list[float]:
    """Median seconds of each, measured in turn."""
    times: list[list[float]] = [[] for _ in contestants]
    for measured in range(ROUNDS + 1):
        for run, kept in zip(contestants, times, strict=True):
            start = time.perf_counter()
            run()
            if measured:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def batches_of(
    sequences: Sequences, groups: Sequence[tuple[np.ndarray, int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded batches as tensors."""
    return [tuple(map(torch.from_numpy, sequences.padded(indices, length))) for indices, length in groups]


def against_floor(model: nn.Module, layers: Sequence[int], tokens: int, folder: Path) -> dict[str, float]:
    """MLP pairs of `layers`, full-length sequences, written to disk, against the bare truncated forward."""
    length = min(256, model.config.max_position_embeddings)
    sequences = random_sequences(np.full(tokens // length, length), model.config.vocab_size)
    points = hook_points(["mlp_in", "mlp_out"], layers)
    row_bytes = len(points) * model.config.hidden_size * 4
    plan = make_plan(sequences, layout="rows", seed=0, batch_size=32, row_bytes=row_bytes)
    body = truncated(model, max(layers) + 1)
    groups = [(batch.indices, batch.length) for unit in plan.units for batch in unit.batches]
    batches = batches_of(sequences, groups)
    bare, ours = seconds(lambda: floor(body, batches), lambda: extract(model, sequences, plan, points, folder))
    count = len(sequences.ids)
    return {"floor_tokens_per_second": count / bare, "tokens_per_second": count / ours, "ratio": bare / ours}


def ragged(model: nn.Module, tokens: int, folder: Path) -> dict[str, float]:
    """Lengths from 16 to 256, written to disk, against padded batches in the dataset's order that write nothing."""
    longest = min(256, model.config.max_position_embeddings)
    lengths = np.random.default_rng(1).integers(16, longest + 1, 2 * tokens // (16 + longest))
    sequences = random_sequences(lengths, model.config.vocab_size)
    layer = model.config.num_hidden_layers // 2
    points = hook_points(["mlp_in", "mlp_out"], [layer])
    plan = make_plan(sequences, layout="rows", seed=0, batch_size=32, row_bytes=2 * model.config.hidden_size * 4)
    body = truncated(model, layer + 1)
    order = np.arange(len(lengths))
    groups = [(order[low : low + 32], int(lengths[low : low + 32].max())) for low in range(0, len(order), 32)]
    batches = batches_of(sequences, groups)
    loop, ours = seconds(lambda: floor(body, batches), lambda: extract(model, sequences, plan, points, folder))
    count = len(sequences.ids)
    return {"loop_tokens_per_second": count / loop, "tokens_per_second": count / ours, "ratio": loop / ours}


def main() -> None:
    """Print one JSON object per comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "one_layer": lambda: against_floor(model, [layers // 2], arguments.tokens, place),
            "all_layers": lambda: against_floor(model, range(layers), arguments.tokens, place),
            "ragged": lambda: ragged(model, arguments.tokens, place),
        }
        for name, measure in parts.items():
            figures = {key: round(value, 3) for key, value in measure().items()}
            print(json.dumps({name: figures}), flush=True)  # noqa: T201 - the figures are what this script is for


if __name__ == "__main__":
    main()
