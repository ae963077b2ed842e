"""One contestant in a process of its own: commands as JSON lines on standard input, answers on standard output."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.bench.training_contestants import (
    BATCH,
    DICT_SIZE,
    REFERENCES,
    TOP_K,
    Race,
    batches,
    judged,
    peak_bytes,
    strongest_first,
    timed,
)

SAMPLE = 16_384
UNSEEN = 32_768
"""Last rows of the text that is trained on; nobody trains on them. The held-out rows are of other files, on which the
model's activations are stronger: a threshold that keeps k latents of the one keeps a sixth more of the other."""


def contestant(name: str, race: Race) -> Any:
    """By its name, from whichever module of the benchmark knows it."""
    if name in REFERENCES:
        return REFERENCES[name](race)
    if name.startswith("ours"):
        return import_module("tests.bench.training_ours").OURS[name](race)
    return import_module("tests.bench.training_peers").PEERS[name](race)


def main() -> None:
    """`training_worker NAME ROWS STEPS THREADS [LEARNING_RATE]`, then {"steps": n} and {"judge": true} to its end."""
    name, path, steps, threads, *rate = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        with safe_open(Path(path), "pt") as found:
            x, y, held_x, held_y = (found.get_tensor(key) for key in ("x", "y", "held_x", "held_y"))
        chosen = float(rate[0]) if rate else None
        race = Race(int(steps), x[:SAMPLE].clone(), y[:SAMPLE].clone(), chosen, DICT_SIZE, TOP_K)
        runner, data = contestant(name, race), batches(x[:-UNSEEN], y[:-UNSEEN])
        for line in sys.stdin:
            command = json.loads(line)
            if "steps" in command:
                answer: dict[str, Any] = {"seconds": timed(runner, data, command["steps"])}
            else:
                answer = judged(runner, held_x, held_y) | {"same_text": judged(runner, x[-UNSEEN:], y[-UNSEEN:])}
                if name.endswith(", 1 prefix"):
                    order = strongest_first(runner, race.x)
                    answer["strongest_first"] = judged(runner, held_x, held_y, order)["fvu_per_prefix"]
            answers.write(json.dumps(answer | {"peak_bytes": peak_bytes(), "batch": BATCH}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
