"""Steps `extract` and `extract_again`: activations of two layers in one pass, then the same ones from the cache."""

from __future__ import annotations

from typing import Any

from services.demo.journey import LAYERS, Journey, Step, pick

_FIGURES = (
    "cache_id", "storage_uri", "file_size_bytes", "extraction_time_seconds", "samples_processed", "tokens",
    "activation_shape", "tokens_per_second", "hook_points", "identity_error",
)  # fmt: skip
_IDENTITY_TOLERANCE = 1e-4


def extract(journey: Journey, step: Step) -> None:
    """`mlp_in` and `mlp_out` of two layers into an activation cache, with the identity check."""
    plan = journey.api.call("ExtractActivations", **_request(journey), validate_only=True)
    step.figures["plan"] = pick(plan, "cache", "estimated_bytes", "estimated_time_seconds", "fits_limit")
    journey.extraction = extraction = _run(journey)
    step.figures |= pick(extraction, *_FIGURES)
    journey.say(
        f"{extraction['tokens']:,} tokens, {len(extraction['hook_points'])} hook points, "
        f"{extraction['file_size_bytes'] / 1e6:,.0f} MB"
    )
    step.check(extraction["tokens"] >= journey.tokens, f"the cache holds {journey.tokens:,} tokens")
    step.check(len(extraction["hook_points"]) == 2 * len(LAYERS), "every site of every layer is in the cache")
    step.check(
        extraction["reused"]
        or extraction.get("identity_error", 1.0) <= _IDENTITY_TOLERANCE,  # then, or when it was filled
        "the MLP recomputed from the captured input gives the captured output",
    )


def extract_again(journey: Journey, step: Step) -> None:
    """The same request again: answered from the cache, without a forward pass."""
    extraction = _run(journey)
    step.figures = pick(extraction, "reused", "cache_id", "message", "extraction_time_seconds", "tokens")
    journey.say(f"{extraction['message']}: {extraction['extraction_time_seconds']:.3f} s")
    step.check(extraction["reused"], "the second extraction is answered from the cache")
    step.check(extraction["cache_id"] == journey.extraction["cache_id"], "it is the same cache")


def _request(journey: Journey) -> dict[str, Any]:
    return {
        "model_id": journey.model_id,
        "dataset_id": journey.train_dataset_id,
        "layer_indices": list(LAYERS),
        "sites": ["mlp_in", "mlp_out"],
        "max_tokens": journey.tokens,
    }


def _run(journey: Journey) -> dict[str, Any]:
    extraction_id = journey.api.call("ExtractActivations", **_request(journey))["extraction_id"]
    extraction = journey.api.call("GetExtraction", id=extraction_id)
    if extraction["status"] != "completed":
        journey.wait(extraction["job_id"], "extract")
        extraction = journey.api.call("GetExtraction", id=extraction_id)
    return extraction
