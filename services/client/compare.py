"""`lensmesh extensions compare`: spec/004's comparison, here and without a mesh."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.client.output import Json, print_json

_DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
_MAX_LENGTH = 128
_PIPED_WIDTH = 120
"""Columns of a file or pipe, which has no width of its own; the table with training needs them."""


def compare(
    *,
    model: Annotated[
        Path | None, typer.Option(help="Directory of a model; spec/004's T5 configuration when left out.")
    ] = None,
    train: Annotated[bool, typer.Option(help="Train each kind on the demo model and its docstring task.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each training.")] = 60,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    targets: Annotated[str, typer.Option(help="Modules to adapt, comma-separated; the family's own by default.")] = "",
    as_json: Json = False,
) -> None:
    """Compare LoRA, an inserted layer and both: parameters, shares, ratios; trained, also losses, seconds, bytes."""
    from services.extensions.compute import ConfigInvalid, ExtensionConfig  # noqa: PLC0415
    from services.residency.checkpoint import CheckpointError  # noqa: PLC0415
    from services.residency.lenses.extension import ExtensionRefused  # noqa: PLC0415

    try:
        config = ExtensionConfig(lora_r=rank, lora_target_modules=tuple(filter(None, targets.split(","))))
        found = _trained(model or _DEMO_MODEL, config, steps) if train else _counted(model, config)
    except (ConfigInvalid, ExtensionRefused, CheckpointError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        print_json(found)
    else:
        _print(found)


def _counted(directory: Path | None, config: Any) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from services.extensions.compute import compare as kinds  # noqa: PLC0415
    from services.residency.checkpoint import read_headers  # noqa: PLC0415
    from services.residency.estimate import parameter_count  # noqa: PLC0415
    from services.residency.loading import config_of, skeleton  # noqa: PLC0415

    if directory is None:
        shapes = skeleton(kinds.spec_config(), torch.float32)
        return kinds.as_json(kinds.counted(shapes, kinds.spec_parameters(shapes), config), {})
    shapes = skeleton(config_of(json.loads((directory / "config.json").read_text())), torch.float32)
    return kinds.as_json(kinds.counted(shapes, parameter_count(shapes, read_headers(directory)), config), {})


def _trained(directory: Path, config: Any, steps: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    from services.extensions.compute import TrainSettings  # noqa: PLC0415
    from services.extensions.compute import compare as kinds  # noqa: PLC0415

    base = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    examples = _docstrings(AutoTokenizer.from_pretrained(directory))
    settings = TrainSettings(steps=steps, batch_size=16, learning_rate=1e-3, warmup_steps=max(1, steps // 20))
    counts = kinds.counted(base, kinds.distinct_parameters(base), config)
    return kinds.as_json(counts, kinds.trained(base, examples, config, settings))


def _docstrings(tokenizer: Any) -> tuple[Any, Any]:
    """The demo's task: a function's signature, and the first line of its docstring; at most 128 tokens a row."""
    from services.demo.corpus import write_corpus  # noqa: PLC0415
    from services.extensions.compute.examples import from_pairs  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="lensmesh-compare-") as root:
        corpus = write_corpus(Path(root))
        found = []
        for name, most in ((corpus.task_train, 4000), (corpus.task_held_out, 200)):
            rows = [json.loads(line) for line in (Path(root) / name).read_text().splitlines()[:most]]
            pairs = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["target"]).input_ids) for row in rows]
            usable = [pair for pair in pairs if len(pair[1]) < _MAX_LENGTH - 2]
            found.append(from_pairs(usable, _MAX_LENGTH, tokenizer.eos_token_id))
    return found[0], found[1]


def _print(found: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(f"Base Model: {found['base']:,} parameters")
    learnt = "loss_after" in found["kinds"]["lora"]
    columns = ["kind", "parameters", "of the base", "of the total", "LoRA", "layer"]
    table = Table(*columns, *(["loss before", "loss after", "seconds", "bytes"] if learnt else []))
    for name, kind in found["kinds"].items():
        row = [
            name,
            f"{kind['trainable']:,}",
            f"{kind['trainable_over_base']:.3%}",
            f"{kind['trainable_over_total']:.3%}",
        ]
        row += [f"{kind['lora']:,}", f"{kind['layer']:,}"]
        if learnt:
            row += [f"{kind['loss_before']:.4f}", f"{kind['loss_after']:.4f}", f"{kind['seconds']:.1f}"]
            row.append(f"{kind['nbytes']:,}")
        table.add_row(*row)
    console.print(table)
    console.print(f"hybrid over lora {found['ratios']['hybrid_over_lora']:.1f}x")
    console.print(f"hybrid over layer {found['ratios']['hybrid_over_layer']:.1f}x")
