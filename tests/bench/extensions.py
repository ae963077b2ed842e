"""What an extension costs, beside plain peft: `python -m tests.bench.extensions`.

One training step against peft and a bare loop, a switch against `peft.load_adapter` from the disk, and the memory of
ten tasks against that of their base. Every pair takes turns in one process; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.extensions.compute import ExtensionConfig, LoRAExtension, Trainer, TrainSettings
from services.extensions.compute.examples import Examples
from services.residency.quantize import tensors_of

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
TARGETS = ("c_attn",)
LENGTH = 128
TASKS = 10


def base() -> PreTrainedModel:
    """The demo model, float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def rows(count: int, vocabulary: int) -> Examples:
    """Random rows; speed does not depend on what they say."""
    ids = torch.randint(3, vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return Examples(ids, ids.clone())


def medians(first: Callable[[], Any], second: Callable[[], Any], turns: int) -> tuple[float, float]:
    """Seconds of each, taken in turns after one of each that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for kept, work in zip(seconds, (first, second), strict=True):
            started = time.perf_counter()
            work()
            if turn:
                kept.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def training(turns: int, batch: int) -> dict[str, float]:
    """Our step against peft's model under a loop of the least that trains: forward, backward, clip, AdamW."""
    ours = LoRAExtension(base(), ExtensionConfig(lora_target_modules=TARGETS))
    ours.create_adapter("bench")
    ours.switch_to(None)
    examples = rows(batch * 8, ours.model.config.vocab_size)
    settings = TrainSettings(steps=10**6, batch_size=batch, lr_schedule="constant")
    trainer = Trainer(ours.model, ours.attached, "bench", examples, settings, config=ours.config)

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    theirs = get_peft_model(base(), config).train()
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    state = {"step": 0}

    def bare() -> None:
        first = state["step"] % 8 * batch
        state["step"] += 1
        ids = examples.ids[first : first + batch]
        theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    mine, peft = medians(trainer.step, bare, turns)
    return {"ours_seconds": mine, "peft_seconds": peft, "ratio": mine / peft, "at_most": 1.05}


def switching(turns: int) -> dict[str, float]:
    """A switch to a resident task against peft reading the adapter from the disk."""
    ours = LoRAExtension(base(), ExtensionConfig(lora_target_modules=TARGETS))
    for task in ("one-task", "two-tasks"):
        ours.create_adapter(task)
    with tempfile.TemporaryDirectory() as place:
        config = LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        theirs = get_peft_model(base(), config).eval()
        theirs.save_pretrained(place)
        count = {"mine": 0, "theirs": 0}

        def switch() -> None:
            count["mine"] += 1
            ours.switch_to(("one-task", "two-tasks")[count["mine"] % 2])

        def load() -> None:
            count["theirs"] += 1
            theirs.load_adapter(place, f"task{count['theirs']}")
            theirs.set_adapter(f"task{count['theirs']}")
            theirs.delete_adapter(f"task{count['theirs'] - 1}" if count["theirs"] > 1 else "default")

        mine, peft = medians(switch, load, turns)
    return {
        "ours_seconds": mine, "peft_seconds": peft, "times_faster": peft / mine, "at_least": 20,
    }  # fmt: skip


def memory() -> dict[str, float]:
    """Bytes of every tensor that is alive with ten tasks, each storage once, against base and extensions summed."""
    model = base()
    alone = _bytes(tensors_of(model).values())
    ours = LoRAExtension(model, ExtensionConfig(lora_target_modules=TARGETS))
    for number in range(TASKS):
        ours.create_adapter(f"task-{number}", seed=number)
    seen = list(tensors_of(model).values())
    for number in range(TASKS):
        ours.switch_to(f"task-{number}")
        seen += tensors_of(model).values()
    ours.switch_to(None)
    total, parts = _bytes(seen), ours.attached.nbytes
    return {"base_bytes": alone, "extensions_bytes": parts, "all_bytes": total, "ratio": total / (alone + parts)}


def _bytes(tensors: Any) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=40, help="timed turns of each pair")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, 128 tokens each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        "training": training(options.turns, options.batch),
        "switching": switching(options.turns),
        "memory": memory(),
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
