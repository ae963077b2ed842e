"""nnsight's side of the comparison, run by its own interpreter: `extraction_nnsight.py MODEL LAYER TOKENS ROUNDS`."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time

import torch
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS, LENGTH = 8, 256


def main() -> None:
    """Print the median of floor / nnsight: input and output of a GPT-2's MLP, stopped behind its layer."""
    folder, layer, tokens, rounds = sys.argv[1], *map(int, sys.argv[2:])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    body = copy.deepcopy(plain).base_model
    del body.h[layer + 1 :]
    body.ln_f = torch.nn.Identity()
    traced = LanguageModel(plain, tokenizer=AutoTokenizer.from_pretrained(folder))
    batches = [torch.randint(1, plain.config.vocab_size, (ROWS, LENGTH)) for _ in range(tokens // (ROWS * LENGTH))]
    ratios = []
    for measured in range(rounds + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                body(input_ids=ids, use_cache=False)
        base = time.perf_counter() - start
        start = time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                with traced.trace(ids) as tracer:
                    traced.transformer.h[layer].mlp.input.save()
                    traced.transformer.h[layer].mlp.output.save()
                    tracer.stop()
        if measured:
            ratios.append(base / (time.perf_counter() - start))
    print(json.dumps({"nnsight": statistics.median(ratios)}))  # noqa: T201 - the figure is what this script is for


if __name__ == "__main__":
    main()
