"""Steps `train` and `evaluate`: a Matryoshka transcoder per layer, judged on held-out text."""

from __future__ import annotations

from typing import Any

from services.client.work import evaluation_of
from services.demo.journey import HEADLINE_LAYER, LAYERS, Journey, Step, pick

DICT_SIZE = 4096
GROUP_SIZES = [256, 512, 1024, 2304]
TOP_K = 32
EVALUATED_ROWS = 8
"""Rows of a held-out batch: what a forward makes of more does not fit a CPU's cache, and takes twice as long."""
BATCH_SIZE = 1024
PASSES = 2
"""Times that the training goes over the cache."""
_EVALUATION_FIGURES = (
    "fvu", "fvu_per_prefix", "fvu_standard_error", "l0", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero_ablated",
    "ce_mean_ablated", "ce_recovered", "kl", "tokens", "batches", "mode",
)  # fmt: skip
MOST_FVU = 0.15
LEAST_CE_RECOVERED = 0.9


def train(journey: Journey, step: Step) -> None:
    """Train both layers' transcoders from one stream of the cache."""
    job = journey.api.call(
        "CreateTrainingJob",
        model_id=journey.model_id,
        layers=list(LAYERS),
        source={"cache_id": journey.extraction["cache_id"]},
        dict_size=DICT_SIZE,
        group_sizes=GROUP_SIZES,
        top_k=TOP_K,
        batch_size=BATCH_SIZE,
        num_tokens=PASSES * journey.tokens,
        seed=0,
    )
    journey.wait(job["id"], "train")
    job = journey.api.call("GetTrainingJob", id=job["id"])
    made = [journey.api.call("GetTranscoder", id=transcoder_id) for transcoder_id in job["transcoder_ids"]]
    journey.transcoders = {transcoder["layer"]: transcoder["id"] for transcoder in made}
    by_layer = {transcoder["layer"]: transcoder["train_fvu"] for transcoder in made}
    step.figures = {
        "train_fvu": by_layer.get(HEADLINE_LAYER),
        "layers": {str(layer): {"train_fvu": fvu} for layer, fvu in by_layer.items() if layer != HEADLINE_LAYER},
        **pick(job, "transcoder_ids", "step", "tokens_seen", "tokens_per_second", "loss"),
    }
    step.check(sorted(by_layer) == list(LAYERS), "there is a transcoder for each layer")
    step.check(job["tokens_seen"] >= PASSES * journey.tokens, f"{PASSES * journey.tokens:,} tokens were seen")


def evaluate(journey: Journey, step: Step) -> None:
    """FVU, FVU per prefix, L0, dead latents and CE recovered on held-out text."""
    by_layer = {layer: _evaluate(journey, layer) for layer in journey.transcoders}
    headline = by_layer.pop(HEADLINE_LAYER, None)
    step.check(headline is not None, f"layer {HEADLINE_LAYER} has a transcoder")
    if headline is None:
        return
    step.figures = headline | {"layers": {str(layer): figures for layer, figures in by_layer.items()}}
    step.check(len(headline["fvu_per_prefix"]) == len(GROUP_SIZES), "every prefix is judged")
    step.check(headline["fvu_per_prefix"][0] > headline["fvu"], "the whole dictionary is better than its first prefix")
    if journey.thresholds:
        step.check(headline["fvu"] <= MOST_FVU, f"held-out FVU is at most {MOST_FVU}")
        step.check(headline["ce_recovered"] >= LEAST_CE_RECOVERED, f"CE recovered is at least {LEAST_CE_RECOVERED}")


def _evaluate(journey: Journey, layer: int) -> dict[str, Any]:
    transcoder_id = journey.transcoders[layer]
    queued = journey.api.call(
        "EvaluateTranscoder",
        id=transcoder_id,
        dataset_id=journey.held_out_dataset_id,
        num_batches=journey.evaluation_batches,
        batch_size=EVALUATED_ROWS,
    )
    journey.wait(queued["job_id"], f"evaluate layer {layer}")
    found = evaluation_of(journey.api.call("ListEvaluations", id=transcoder_id), queued["job_id"])
    prefixes = ", ".join(f"{fvu:.3f}" for fvu in found["fvu_per_prefix"])
    journey.say(
        f"layer {layer}: FVU {found['fvu']:.3f} (per prefix {prefixes}), L0 {found['l0']:.1f}, "
        f"dead {found['dead_fraction']:.1%}, CE recovered {found['ce_recovered']:.3f}"
    )
    return pick(found, *_EVALUATION_FIGURES)
