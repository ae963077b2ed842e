"""Extraction against its floor and its peers, as ratios of one run: `python -m tests.bench.extraction [MODEL_DIR]`.

The floor is a bare forward pass of the same batches, cut off behind the deepest hook point by a model that has no
further layers: no hooks, no copies, nothing written. Peers capture the same tensors of the same batches and write
nothing. Each contestant runs in turn behind a floor, several rounds; what counts is the median of the ratios, so that
a machine's moods meet all of them. nnsight has an environment of its own: `--nnsight /path/to/its/python`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.run import sums
from services.extraction.compute import Moments, Plan, UnitFiller, fill_units, make_plan
from services.extraction.compute.plan import TOKENS_AT_ONCE
from services.residency.families import family_of, hook_points
from services.residency.memory import keep_freed
from services.residency.shards import Layout
from services.residency.texts import Sequences

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
ROUNDS = 5
Contestant = Callable[[], None]
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Ids and mask of forward passes, [B, S] int64 each."""


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
def floor(body: nn.Module, batches: Batches) -> None:
    """Forward passes and nothing else; full batches without a mask, as the engine runs them."""
    for ids, mask in batches:
        padded = not bool(mask.all())
        body(input_ids=ids, use_cache=False, **({"attention_mask": mask} if padded else {}))


def extract(model: nn.Module, sequences: Sequences, plan: Plan, points: list[str], folder: Path) -> None:
    """Everything a worker does with tensors and files: capture, shuffle, sum up, write, flush, hash."""
    work = WorkFolder(folder, "bench")
    work.open("")
    writing: Future | None = None

    def write(filled: UnitFiller, moments: dict[str, Moments]) -> None:
        work.write(filled.unit.index, 1, filled.tensors, sums(moments))
        filled.release()

    with ThreadPoolExecutor(1) as executor:
        for filled in fill_units(model, sequences, plan, hook_points=points, dtype=torch.float32):
            moments = filled.moments()
            if writing is not None:
                writing.result()
            writing = executor.submit(write, filled, moments)
        if writing is not None:
            writing.result()
    work.discard()


def against(floor_run: Contestant, contestants: Mapping[str, Contestant]) -> dict[str, float]:
    """Median seconds of the floor, and of each contestant the median of floor / contestant over the rounds.

    Each has a floor of its own right before it: a minute later the machine may be another one.
    """
    floors: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in contestants}
    for measured in range(ROUNDS + 1):
        for name, run in contestants.items():
            base, spent = _seconds(floor_run), _seconds(run)
            if measured:  # the first round warms up
                floors.append(base)
                ratios[name].append(base / spent)
    return {"floor_seconds": statistics.median(floors)} | {
        name: statistics.median(found) for name, found in ratios.items()
    }


def _seconds(run: Contestant) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def batches_of(sequences: Sequences, groups: Sequence[tuple[np.ndarray, int]]) -> Batches:
    """Padded batches as tensors."""
    return [tuple(map(torch.from_numpy, sequences.padded(indices, length))) for indices, length in groups]


def tuned_plan(sequences: Sequences, points: Sequence[str], width: int, layout: Layout = "rows") -> Plan:
    """The plan that the service makes of a request with its defaults on a CPU."""
    return make_plan(
        sequences,
        layout=layout,
        seed=0,
        batch_size=32,
        batch_tokens=TOKENS_AT_ONCE["cpu"],
        row_bytes=len(points) * width * 4,
    )


@torch.inference_mode()
def hidden_states(model: nn.Module, batches: Batches) -> None:
    """What Transformers itself offers: every layer's residual stream of a whole forward."""
    for ids, _ in batches:
        model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)


def transformer_lens(folder: Path, model: nn.Module, points: Sequence[str], layers: int) -> Callable[[Batches], None]:
    """`run_with_cache` of exactly these hook points, stopped behind them."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(model), tokenizer=tokenizer)
    stop = {"stop_at_layer": layers} if layers < model.config.num_hidden_layers else {}

    @torch.inference_mode()
    def run(batches: Batches) -> None:
        for ids, _ in batches:
            bridge.run_with_cache(ids, names_filter=list(points), **stop)

    return run


def full_length(model: nn.Module, layers: Sequence[int], tokens: int, folder: Path, place: Path) -> dict[str, float]:
    """MLP pairs of `layers`, sequences of 256 tokens, ours written to disk."""
    length = min(256, model.config.max_position_embeddings)
    sequences = random_sequences(np.full(tokens // length, length), model.config.vocab_size)
    points, deepest = hook_points(["mlp_in", "mlp_out"], layers), max(layers) + 1
    plan, body = tuned_plan(sequences, points, model.config.hidden_size), truncated(model, deepest)
    batches = batches_of(sequences, [(batch.indices, batch.length) for unit in plan.units for batch in unit.batches])
    lens = transformer_lens(folder, model, points, deepest)
    found = against(
        lambda: floor(body, batches),
        {
            "ours": lambda: extract(model, sequences, plan, points, place),
            "transformer_lens": lambda: lens(batches),
            "output_hidden_states": lambda: hidden_states(model, batches),
        },
    )
    return found | {"floor_tokens_per_second": len(sequences.ids) / found["floor_seconds"]}


def ragged(model: nn.Module, tokens: int, place: Path) -> dict[str, float]:
    """Lengths from 16 to 256, written to disk, against padded batches in the dataset's order that write nothing.

    The loop is run with 32 sequences at once and with as many as our plan takes of the longest; the faster one counts.
    """
    longest = min(256, model.config.max_position_embeddings)
    lengths = np.random.default_rng(1).integers(16, longest + 1, 2 * tokens // (16 + longest))
    sequences = random_sequences(lengths, model.config.vocab_size)
    layer = model.config.num_hidden_layers // 2
    points = hook_points(["mlp_in", "mlp_out"], [layer])
    plan, body = tuned_plan(sequences, points, model.config.hidden_size), truncated(model, layer + 1)
    order = np.arange(len(lengths))
    loops: dict[str, Contestant] = {}
    for size in (32, max(1, TOKENS_AT_ONCE["cpu"] // longest)):
        cuts = [order[low : low + size] for low in range(0, len(order), size)]
        padded = batches_of(sequences, [(cut, int(lengths[cut].max())) for cut in cuts])
        loops[f"loop_of_{size}"] = partial(floor, body, padded)
    found = against(lambda: extract(model, sequences, plan, points, place), loops)
    slower = min(1 / found[name] for name in loops)
    return {"ours_tokens_per_second": len(sequences.ids) / found["floor_seconds"], "ours_over_best_loop": slower} | {
        f"ours_over_{name}": 1 / found[name] for name in loops
    }


def thousand(model: nn.Module, samples: int, place: Path) -> dict[str, float]:
    """spec/003: samples of 256 tokens, three layers' residual streams in layout `sequences`; seconds."""
    length = min(256, model.config.max_position_embeddings)
    sequences = random_sequences(np.full(samples, length), model.config.vocab_size)
    points = hook_points(["resid_post"], np.linspace(0, model.config.num_hidden_layers - 1, 3).astype(int).tolist())
    plan = tuned_plan(sequences, points, model.config.hidden_size, layout="sequences")
    return {"samples": samples, "seconds": _seconds(lambda: extract(model, sequences, plan, points, place))}


def nnsight(python: Path, folder: Path, layer: int, tokens: int) -> dict[str, float]:
    """Run the peer under its own interpreter, with a floor of its own there."""
    script = Path(__file__).with_name("extraction_nnsight.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-P", str(script), str(folder), str(layer), str(tokens), str(ROUNDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one JSON object per comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--nnsight", type=Path, help="python of an environment that has nnsight")
    told = parser.parse_args()
    keep_freed()  # as the services do; the floor and the peers have it, too
    model = AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "one_layer": lambda: full_length(model, [layers // 2], told.tokens, told.model, place),
            "all_layers": lambda: full_length(model, range(layers), told.tokens, told.model, place),
            "ragged": lambda: ragged(model, told.tokens, place),
            "thousand_samples": lambda: thousand(model, told.samples, place),
        }
        if told.nnsight is not None:
            parts["nnsight"] = lambda: nnsight(told.nnsight, told.model, layers // 2, told.tokens)
        for name, measure in parts.items():
            figures = {key: round(value, 3) for key, value in measure().items()}
            print(json.dumps({name: figures}), flush=True)  # noqa: T201 - the figures are what this script is for


if __name__ == "__main__":
    main()
