"""`lensmesh extract`, `evaluate`, `groups`, `extensions`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from services.client.output import Json, session
from services.client.progress import wait_for_job

groups = typer.Typer(help="One base and its lenses.", no_args_is_help=True)
extensions = typer.Typer(help="LoRA adapters and inserted layers.", no_args_is_help=True)

Layers = Annotated[str, typer.Option(help="Layer numbers, comma-separated.")]


def extract(
    model_id: str,
    dataset_id: str,
    *,
    layers: Layers,
    sites: Annotated[str, typer.Option(help="Sites of each layer, comma-separated.")] = "mlp_in,mlp_out",
    sample_count: Annotated[int | None, typer.Option(help="Dataset rows to use; all when left out.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens; all when 0.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; what is behind is cut off.")] = 0,
    special_tokens: Annotated[str, typer.Option(help="Around each row: tokenizer, none or bos.")] = "tokenizer",
    packing: Annotated[bool, typer.Option("--packing", help="Join rows: no token is cut off.")] = False,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle the rows of a shard.")] = False,
    extension_id: Annotated[str, typer.Option("--extension", help="Extension in force.")] = "",
    mode: Annotated[str, typer.Option(help="full, safe, cpu or auto.")] = "auto",
    plan: Annotated[bool, typer.Option(help="Only say what it would take.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a dataset into an activation cache."""
    with session(as_json) as to:
        fields: dict[str, Any] = {
            "layer_indices": numbers(layers),
            "sites": sites.split(","),
            "max_tokens": max_tokens,
            "max_length": max_length,
            "special_tokens": special_tokens,
            "packing": packing,
            "keep_order": keep_order,
            "extension_id": extension_id,
            "mode": mode,
        }
        fields |= {} if sample_count is None else {"sample_count": sample_count}
        started = to.api.call(
            "ExtractActivations", model_id=model_id, dataset_id=dataset_id, validate_only=plan, **fields
        )
        if plan:
            to.show(started)
            return
        extraction = to.api.call("GetExtraction", id=started["extraction_id"])
        if extraction["status"] in ("queued", "extracting"):
            wait_for_job(to.api, extraction["job_id"], "extract", to.console)
            extraction = to.api.call("GetExtraction", id=started["extraction_id"])
        to.show(extraction)


def evaluate(
    transcoder_id: str,
    dataset_id: str,
    *,
    mode: Annotated[str, typer.Option(help="full, safe, cpu or auto.")] = "auto",
    batches: Annotated[int, typer.Option(help="Batches; by mode when 0.")] = 0,
    samples: Annotated[int, typer.Option(help="Strongest contexts to keep of every latent.")] = 0,
    devices: Annotated[int, typer.Option(help="Split a model that no device holds alone over so many.")] = 0,
    as_json: Json = False,
) -> None:
    """Judge a transcoder on held-out text: FVU, L0, dead latents, CE recovered, KL."""
    with session(as_json) as to:
        fields: dict[str, Any] = {"mode": mode, "num_batches": batches, "samples_per_feature": samples}
        queued = to.api.call("EvaluateTranscoder", id=transcoder_id, dataset_id=dataset_id, devices=devices, **fields)
        wait_for_job(to.api, queued["job_id"], "evaluate", to.console)
        to.show(evaluation_of(to.api.call("ListEvaluations", id=transcoder_id), queued["job_id"]))


def evaluation_of(reply: dict[str, Any], job_id: str) -> dict[str, Any]:
    """The evaluation that a job made, from a list of them."""
    return next(one for one in reply["evaluations"] if one["job_id"] == job_id)


@groups.command("create")
def create_group(name: str, model: Annotated[str, typer.Option(help="Its base.")], as_json: Json = False) -> None:
    """Make a group."""
    with session(as_json) as to:
        to.show(to.api.call("CreateGroup", name=name, model_id=model))


@groups.command("list")
def list_groups(as_json: Json = False) -> None:
    """Groups, newest first."""
    with session(as_json) as to:
        to.rows(
            to.api.call("ListGroups"), "groups", "id", "name", "model_id", "active_lens_id", "estimated_memory_bytes"
        )


@groups.command("status")
def show_group(group_id: str, as_json: Json = False) -> None:
    """Where a group's parts are and what a switch would take."""
    with session(as_json) as to:
        to.show(to.api.call("GetGroupStatus", id=group_id))


@groups.command("attach")
def attach_lens(
    group_id: str,
    kind: Annotated[str, typer.Option(help="transcoder, extension or logit_lens.")],
    transcoder: str = "",
    extension: str = "",
    as_json: Json = False,
) -> None:
    """Attach a lens."""
    with session(as_json) as to:
        fields = {"kind": kind, "transcoder_id": transcoder, "extension_id": extension}
        to.show(to.api.call("AttachLens", group_id=group_id, **fields))


@groups.command("detach")
def detach_lens(group_id: str, lens_id: str, as_json: Json = False) -> None:
    """Take a lens off."""
    with session(as_json) as to:
        to.show(to.api.call("DetachLens", group_id=group_id, lens_id=lens_id))


@groups.command("switch")
def switch_lens(
    group_id: str,
    lens_id: Annotated[str | None, typer.Argument(help="The base alone when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Make a lens the active one."""
    with session(as_json) as to:
        to.show(to.api.call("SwitchLens", id=group_id, **({} if lens_id is None else {"lens_id": lens_id})))


@groups.command("preload")
def preload_group(
    group_id: str,
    lens: Annotated[list[str] | None, typer.Option(help="Only this lens; all when left out.")] = None,
    parked: Annotated[bool, typer.Option("--parked", help="Into host memory, not onto a device.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the base and the lenses to where a switch is fast."""
    with session(as_json) as to:
        residency = {"residency": "parked"} if parked else {}
        to.show(to.api.call("PreloadGroup", id=group_id, lens_ids=lens or [], **residency))


@groups.command("analyze")
def analyze_text(
    group_id: str,
    text: str,
    *,
    lens: Annotated[list[str] | None, typer.Option(help="Lens to read with; the active one when left out.")] = None,
    top_k: int = 5,
    change: Annotated[list[str] | None, typer.Option(help='As {"site": "mlp_out", "layer": 1, "op": "zero"}.')] = None,
    as_json: Json = False,
) -> None:
    """Read a text through lenses, with changes of the forward pass if there are any."""
    try:
        more = {"interventions": [json.loads(each) for each in change]} if change else {}
    except ValueError as error:
        raise typer.BadParameter("has to be JSON", param_hint="--change") from error
    with session(as_json) as to:
        to.show(to.api.call("AnalyzeText", id=group_id, text=text, lens_ids=lens or [], top_k=top_k, **more))


@groups.command("delete")
def delete_group(group_id: str, as_json: Json = False) -> None:
    """Delete a group; its lenses' artifacts stay."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteGroup", id=group_id))


@extensions.command("create")
def create_extension(
    model_id: str,
    task_name: str,
    kind: Annotated[str, typer.Option(help="lora, layer or hybrid.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    as_json: Json = False,
) -> None:
    """Make an extension; it may be trained and activated from then on."""
    with session(as_json) as to:
        fields: dict[str, Any] = {"model_id": model_id, "task_name": task_name, "kind": kind}
        if kind != "layer":
            fields["lora"] = {"r": rank}
        if kind != "lora":
            fields["layer"] = {}
        to.show(to.api.call("CreateExtension", **fields))


@extensions.command("list")
def list_extensions(as_json: Json = False) -> None:
    """Extensions, newest first."""
    with session(as_json) as to:
        to.rows(to.api.call("ListExtensions"), "extensions", "id", "model_id", "task_name", "kind", "status", "active")


@extensions.command("show")
def show_extension(extension_id: str, as_json: Json = False) -> None:
    """One extension."""
    with session(as_json) as to:
        to.show(to.api.call("GetExtension", id=extension_id))


@extensions.command("train")
def train_extension(
    extension_id: str,
    dataset_id: str,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    held_out: Annotated[str, typer.Option(help="Dataset for the held-out loss.")] = "",
    as_json: Json = False,
) -> None:
    """Train an extension on one task."""
    with session(as_json) as to:
        fields = {"dataset_id": dataset_id, "steps": steps, "held_out_dataset_id": held_out}
        job_id = to.api.call("TrainExtension", id=extension_id, **fields)["job_id"]
        wait_for_job(to.api, job_id, "train", to.console)
        to.show(to.api.call("GetExtension", id=extension_id))


@extensions.command("activate")
def activate_extension(extension_id: str, as_json: Json = False) -> None:
    """Make it the active lens of its base."""
    with session(as_json) as to:
        to.show(to.api.call("ActivateExtension", id=extension_id))


@extensions.command("deactivate")
def deactivate_extension(extension_id: str, as_json: Json = False) -> None:
    """Make the base alone active again."""
    with session(as_json) as to:
        to.show(to.api.call("DeactivateExtension", id=extension_id))


@extensions.command("evaluate")
def evaluate_extension(extension_id: str, dataset_id: str, as_json: Json = False) -> None:
    """Its loss beside its base's."""
    with session(as_json) as to:
        to.show(to.api.call("EvaluateExtension", id=extension_id, dataset_id=dataset_id))


@extensions.command("generate")
def generate_text(extension_id: str, prompt: str, max_new_tokens: int = 64, as_json: Json = False) -> None:
    """Continue a prompt with it."""
    with session(as_json) as to:
        fields = {"prompt": prompt, "max_new_tokens": max_new_tokens}
        to.show(to.api.call("GenerateWithExtension", id=extension_id, **fields))


@extensions.command("delete")
def delete_extension(extension_id: str, as_json: Json = False) -> None:
    """Delete an extension."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteExtension", id=extension_id))


def numbers(text: str) -> list[int]:
    """Whole numbers of a comma-separated list.

    Raises:
        typer.BadParameter: one of them is not a number.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2") from None
