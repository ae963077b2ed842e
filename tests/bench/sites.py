"""Does a transcoder that reads the MLP's input (`mlp_in`) beat one that reads the residual stream (`resid_mid`)?

    python tests/bench/sites.py            # about ten minutes of one CPU core
    python tests/bench/sites.py --quick    # does it run

A Gemma-2-shaped model is trained on the source of Python's standard library, then both sites get transcoders of equal
size, tokens and settings, several seeds each, judged on the held-out files: FVU, and CE recovered when they take over.
Prints one line of JSON a transcoder, then one for each site and one for the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "demo")]

from train_tiny_gpt2 import learning_rate, sources  # noqa: E402

from services.extraction.compute import capture  # noqa: E402
from services.residency.families import SITES, family_of  # noqa: E402
from services.training.compute import TrainConfig, fit  # noqa: E402
from services.training.compute.evaluation import Evaluation  # noqa: E402

CONTEXT, WIDTH, LAYERS, LAYER = 128, 192, 4, 2
LEGACY = {"mlp_in": False, "resid_mid": True}
"""Sites, and whether they are kept for comparison only."""


def streams(characters: int) -> tuple[Tensor, Tensor, int]:
    """Tokens to train on and to judge on, int64, and the vocabulary's size; the demo's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "deploy" / "demo" / "tiny-gpt2")
    found = []
    for tests in (False, True):
        texts = sources(tests=tests)[:: 3 if not tests else 1]
        text = "\n".join(texts)[: characters if not tests else characters // 4]
        pieces = [text[start : start + 20_000] for start in range(0, len(text), 20_000)]
        ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        found.append(torch.tensor([token for piece in ids for token in piece]))
    return found[0], found[1], len(tokenizer)


def windows(stream: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Windows at random places, int64 [batch_size, CONTEXT], each behind token 0, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - CONTEXT, (batch_size,), generator=generator)
        found = torch.stack([stream[start : start + CONTEXT] for start in starts])
        found[:, 0] = 0
        yield found


def trained_model(stream: Tensor, vocabulary: int, steps: int) -> Gemma2ForCausalLM:
    """A small Gemma-2 from scratch."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, query_pre_attn_scalar=WIDTH // 4,
        max_position_embeddings=CONTEXT, sliding_window=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in zip(range(steps), windows(stream, 16, 0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak=2e-3, warm_up=steps // 10)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            tell({"model_step": step, "loss": round(loss.item(), 3)})
    return model.eval()


def activations(model: Gemma2ForCausalLM, stream: Tensor, tokens: int) -> dict[str, Tensor]:
    """By hook point [tokens, WIDTH], without each window's first token."""
    points = [f"blocks.{LAYER}.{SITES[site]}" for site in (*LEGACY, "mlp_out")]
    parts: dict[str, list[Tensor]] = {point: [] for point in points}
    batches = [
        batch for _, batch in zip(range(-(-tokens // (32 * (CONTEXT - 1)))), windows(stream, 32, 1), strict=False)
    ]
    for found in capture(model, batches, points):
        for point, rows in found.items():
            parts[point].append(rows.view(-1, CONTEXT, WIDTH)[:, 1:].flatten(0, 1))
    return {point: torch.cat(rows)[:tokens] for point, rows in parts.items()}


def judged(model: Gemma2ForCausalLM, transcoder: Any, stream: Tensor, batches: int) -> Any:
    """Our evaluation on held-out windows."""
    chosen = [batch for _, batch in zip(range(batches), windows(stream, 16, 2), strict=False)]
    evaluation = Evaluation(model, family_of(model), transcoder)
    for ids in chosen:
        mask = torch.ones_like(ids)
        evaluation.read(ids, mask, mask * (torch.arange(CONTEXT) > 0))
    for ids in chosen:
        evaluation.score(ids, torch.ones_like(ids))
    return evaluation.result()


def tell(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    stream, held_out, vocabulary = streams(200_000 if quick else 6_000_000)
    model = trained_model(stream, vocabulary, 5 if quick else 500)
    rows = activations(model, stream, 4_000 if quick else 200_000)
    target = f"blocks.{LAYER}.{SITES['mlp_out']}"
    found: dict[str, list[tuple[float, float]]] = {site: [] for site in LEGACY}
    for seed in range(3):
        for site, legacy in LEGACY.items():
            source = f"blocks.{LAYER}.{SITES[site]}"
            config = TrainConfig(dict_size=2048, top_k=32, num_tokens=4_000 if quick else 400_000, seed=seed)
            transcoder, _ = fit(rows[source], rows[target], config)
            transcoder.info |= {"source_hook_point": source, "target_hook_point": target}
            one = judged(model, transcoder, held_out, 2 if quick else 24)
            found[site].append((one.fvu, one.ce_recovered))
            tell({
                "site": site, "legacy": legacy, "seed": seed, "fvu": one.fvu,
                "fvu_standard_error": one.fvu_standard_error,
                "ce_clean": one.ce_clean, "ce_spliced": one.ce_spliced, "ce_recovered": one.ce_recovered,
                "ce_standard_error": one.ce_standard_error, "l0": one.l0, "dead": one.dead_fraction,
            })  # fmt: skip
    for site, figures in found.items():
        tell({"site": site, "legacy": LEGACY[site], **_means(figures)})
    pairs = zip(found["mlp_in"], found["resid_mid"], strict=True)
    tell({"mlp_in_minus_resid_mid": _means([(a[0] - b[0], a[1] - b[1]) for a, b in pairs])})


def _means(figures: list[tuple[float, float]]) -> dict[str, float]:
    """Mean over seeds, and its standard error."""
    columns = dict(zip(("fvu", "ce_recovered"), zip(*figures, strict=True), strict=True))
    return {name: statistics.mean(values) for name, values in columns.items()} | {
        f"{name}_standard_error": statistics.stdev(values) / math.sqrt(len(values)) for name, values in columns.items()
    }


if __name__ == "__main__":
    main()
