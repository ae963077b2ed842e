"""Step `extension`: a LoRA adapter that learns to write docstrings, and leaves no trace when it is not active."""

from __future__ import annotations

from typing import Any

from services.demo.journey import Journey, Step, pick
from services.demo.lenses import SENTENCE

_RANK = 8


def extension(journey: Journey, step: Step) -> None:
    """Train it, compare held-out loss with the base's, activate it, and find the base unchanged afterwards."""
    api = journey.api
    task_id, held_out_id = (
        _register(journey, name, identifier)
        for name, identifier in (
            ("demo task", journey.corpus.task_train),
            ("demo task held-out", journey.corpus.task_held_out),
        )
    )
    before = _logits(journey)
    made = api.call(
        "CreateExtension", model_id=journey.model_id, task_name="docstrings", kind="lora", lora={"r": _RANK}
    )
    loss_before = api.call("EvaluateExtension", id=made["id"], dataset_id=held_out_id)
    fields = {
        "dataset_id": task_id,
        "held_out_dataset_id": held_out_id,
        "steps": journey.extension_steps,
        "batch_size": 16,
    }
    journey.wait(api.call("TrainExtension", id=made["id"], max_length=128, **fields)["job_id"], "train extension")
    loss_after = api.call("EvaluateExtension", id=made["id"], dataset_id=held_out_id)
    lens = api.call("AttachLens", group_id=journey.group_id, kind="extension", extension_id=made["id"])
    activated = api.call("ActivateExtension", id=made["id"])
    with_and_without = _read(journey, lens["id"])
    deactivated = api.call("DeactivateExtension", id=made["id"])
    after = _logits(journey)
    step.figures = {
        "id": made["id"],
        "parameter_counts": made["parameter_counts"],
        "loss_before": loss_before["loss"],
        "loss_after": loss_after["loss"],
        "base_loss": loss_after["base_loss"],
        "activate_seconds": activated["seconds"],
        "deactivate_seconds": deactivated["seconds"],
        "base_unchanged": loss_after["base_unchanged"] and before == after,
        **pick(api.call("GetExtension", id=made["id"]), "trained_steps", "status"),
    }
    before_and_after = f"{loss_before['loss']:.3f} before, {loss_after['loss']:.3f} after"
    journey.say(f"held-out loss {before_and_after} {journey.extension_steps} steps")
    step.check(loss_before["loss"] == loss_before["base_loss"], "an untrained extension is the base")
    step.check(loss_after["loss"] < loss_before["loss"], "training lowers the held-out loss")
    step.check(activated["active"] and not deactivated["active"], "it is active when asked for, and only then")
    step.check(
        any(token["predictions"] != token["base_predictions"] for token in with_and_without),
        "the extension changes the predictions",
    )
    step.check(step.figures["base_unchanged"], "the base's logits are restored exactly")


def _logits(journey: Journey) -> list[Any]:
    """What the base predicts after its last layer for every token of a text, to the last bit that JSON carries."""
    tokens = _read(journey, journey.logit_lens_id)
    return [token["layers"][-1]["predictions"] for token in tokens if token.get("layers")]


def _read(journey: Journey, lens_id: str) -> list[dict[str, Any]]:
    fields = {"text": SENTENCE, "lens_ids": [lens_id], "top_k": 100}
    return list(journey.api.call("AnalyzeText", id=journey.group_id, **fields)["readings"][0]["tokens"])


def _register(journey: Journey, name: str, identifier: str) -> str:
    fields = {"source": "local", "identifier": identifier, "prompt_field": "prompt", "target_field": "target"}
    return str(journey.api.call("CreateDataset", name=name, **fields)["id"])
