"""What feature samples cost an evaluation: `python -m tests.bench.samples`; at most a tenth of its time.

The demo model's layer 2, a transcoder with 4,096 latents of which 32 are active, 10 contexts of each; the sampler's
time is taken inside of the evaluation that it is part of.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from services.residency.families import facts, family_of
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.loading import load_model
from services.training.compute.evaluation import Evaluation
from services.training.compute.features import FeatureSampler

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
GROUPS, TOP_K, LAYER, MOST = (256, 512, 1024, 2304), 32, 2, 10


class Timed(FeatureSampler):
    """Knows how long it took."""

    seconds = 0.0

    def add(self, *batch: object) -> None:
        """One batch."""
        begin = time.perf_counter()
        super().add(*batch)
        self.seconds += time.perf_counter() - begin


def coder(width: int) -> Transcoder:
    """Of random directions: which latents are active is spread more evenly than a trained one's, which costs more."""
    generator, latents = torch.Generator().manual_seed(0), sum(GROUPS)
    weights = {
        "W_enc": torch.randn(width, latents, generator=generator),
        "b_enc": torch.zeros(latents),
        "W_dec": torch.randn(latents, width, generator=generator) / width,
        "b_dec": torch.zeros(width),
        "threshold": torch.zeros(latents),
    }
    points = {
        "source_hook_point": f"blocks.{LAYER}.mlp.hook_in",
        "target_hook_point": f"blocks.{LAYER}.hook_mlp_out",
    }
    return Transcoder(TranscoderShape("topk", TOP_K, GROUPS), weights, points)


def main() -> int:
    """0 where it is a tenth at most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = load_model(MODEL, "none")
    known = facts(model.config.to_dict())
    generator = torch.Generator().manual_seed(1)
    shape = (8, min(known.context_length, 256))
    batches = [torch.randint(0, known.vocab_size, shape, generator=generator) for _ in range(asked.batches)]
    sampler = Timed(sum(GROUPS), MOST)
    evaluation = Evaluation(model, family_of(model), coder(known.hidden_size), None, sampler)
    begin = time.perf_counter()
    for ids in batches:
        evaluation.read(ids, torch.ones_like(ids), torch.ones_like(ids))
    for ids in batches:
        evaluation.score(ids, torch.ones_like(ids))
    whole = time.perf_counter() - begin
    share = sampler.seconds / whole
    tokens = asked.batches * shape[0] * shape[1]
    sys.stdout.write(f"{tokens} tokens in {whole:.1f} s, of it {100 * share:.1f} % for samples (<= 10)\n")
    return int(share > 0.1)


if __name__ == "__main__":
    sys.exit(main())
