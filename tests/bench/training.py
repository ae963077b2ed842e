"""Training against its floor and against public trainers: `python -m tests.bench.training COMMAND`.

Rows are what layer 2 of the demo model reads and adds on the Python standard library's text: d 256, dictionary 4096 in
groups of 256, 512, 1024 and 2304, k 32, batches of 2048, two threads; every program gets the same rows in the same
order. The peers live in an environment of their own, which the first run builds.

  speed     milliseconds of a step, in turns, and the ratios (minutes)
  quality   held-out FVU of every prefix after 250,000 and 2,000,000 tokens, L0, dead latents; how far nested prefixes
            are below an un-nested coder that is cut off there (an hour)
  size      memory bound, loader's share, spec/002's own configuration (minutes)
  growth    step time over D, B and k, with a plot (minutes)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.bench import training_quality, training_size, training_speed
from tests.bench.training_rows import prepared
from tests.bench.training_run import peers_python


def main() -> None:
    """Print one command's figures, and keep them as JSON beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["speed", "quality", "size", "growth"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lensmesh-bench"), help="rows and results")  # noqa: S108
    parser.add_argument("--peers", type=Path, default=Path("/tmp/lensmesh-peers"), help="the peers' environment")  # noqa: S108
    parser.add_argument("--rows", type=int, default=524_288, help="rows that are extracted, once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[250_000, 2_000_000], help="quality: rows trained on")
    parser.add_argument("--turns", type=int, default=15, help="speed: turns of three steps")
    parser.add_argument("--steps", type=int, default=20, help="size, growth: steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="speed, quality: programs")
    options = parser.parse_args()
    rows = prepared(options.folder, options.rows)
    found: Any
    if options.command == "size":
        found = training_size.sizes(rows, steps=options.steps, threads=options.threads)
    elif options.command == "growth":
        found = training_size.grown(options.folder, options.steps, options.threads)
    elif options.command == "speed":
        names = options.only or training_speed.NAMES
        peers = peers_python(options.peers)
        found = training_speed.speed(rows, peers, names, turns=options.turns, threads=options.threads)
    else:
        names = options.only or training_quality.OURS + training_quality.RIVALS
        peers = peers_python(options.peers)
        found = training_quality.quality(rows, peers, options.tokens, names, options.threads)
    target = options.folder / f"{options.command}.json"
    target.write_text(json.dumps(found, indent=1))
    sys.stdout.write(f"kept in {target}\n")


if __name__ == "__main__":
    main()
