"""`lensmesh models`, `datasets`, `devices`, `jobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.client.output import Json, session
from services.client.progress import wait_for_job, wait_for_load

models = typer.Typer(help="Registered base transformers.", no_args_is_help=True)
datasets = typer.Typer(help="Registered text.", no_args_is_help=True)
jobs = typer.Typer(help="Jobs of all services.", no_args_is_help=True)

Source = Annotated[str, typer.Option(help="huggingface, local, or custom for models and inline for datasets.")]
Identifier = Annotated[str, typer.Option(help="Hub id, or path below one of the mesh's roots.")]
Quantization = Annotated[str, typer.Option(help="none, fp16, bf16, int8 or int4.")]


@models.command("create")
def create_model(
    name: str,
    *,
    identifier: Identifier,
    source: Source = "huggingface",
    quantization: Quantization = "none",
    revision: str = "",
    as_json: Json = False,
) -> None:
    """Register a model; its config and sizes are read at once."""
    with session(as_json) as to:
        fields = {"name": name, "source": source, "model_identifier": identifier, "quantization": quantization}
        to.show(to.api.call("CreateModel", **fields, revision=revision))


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """Models, newest first."""
    with session(as_json) as to:
        columns = ("id", "name", "model_type", "quantization", "status", "parameter_count", "device")
        to.rows(to.api.call("ListModels"), "models", *columns)


@models.command("show")
def show_model(model_id: str, as_json: Json = False) -> None:
    """One model."""
    with session(as_json) as to:
        to.show(to.api.call("GetModel", id=model_id))


@models.command("estimate")
def estimate_model(model_id: str, quantization: Quantization = "none", as_json: Json = False) -> None:
    """What a load would need, where it fits, and what would be evicted."""
    with session(as_json) as to:
        to.show(to.api.call("EstimateModel", id=model_id, quantization=quantization))


@models.command("load")
def load_model(
    model_id: str,
    quantization: Annotated[str, typer.Option(help="The model's own when left out.")] = "",
    as_json: Json = False,
) -> None:
    """Load a model and wait until it is ready."""
    with session(as_json) as to:
        fields = {"quantization": quantization} if quantization else {}
        started = to.api.call("LoadModel", id=model_id, **fields)
        if started["status"] == "loading":
            wait_for_load(to.api, model_id, started["task_id"], to.console)
        to.show(to.api.call("GetModel", id=model_id))


@models.command("unload")
def unload_model(model_id: str, as_json: Json = False) -> None:
    """Take a model off its device."""
    with session(as_json) as to:
        to.show(to.api.call("UnloadModel", id=model_id))


@models.command("delete")
def delete_model(
    model_id: str,
    cascade: Annotated[bool, typer.Option(help="Delete what uses it as well.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a model and its files."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteModel", id=model_id, cascade=cascade))


@datasets.command("create")
def create_dataset(
    name: str,
    *,
    identifier: Identifier,
    source: Source = "huggingface",
    split: str = "train",
    text_field: str = "text",
    prompt_field: Annotated[str, typer.Option(help="Column of prompts, with --target-field.")] = "",
    target_field: Annotated[str, typer.Option(help="Column of what follows them.")] = "",
    as_json: Json = False,
) -> None:
    """Register text."""
    with session(as_json) as to:
        fields = {"name": name, "source": source, "identifier": identifier, "split": split, "text_field": text_field}
        pair = {"prompt_field": prompt_field, "target_field": target_field}
        fields |= {field: column for field, column in pair.items() if column}
        to.show(to.api.call("CreateDataset", **fields))


@datasets.command("list")
def list_datasets(as_json: Json = False) -> None:
    """Datasets, newest first."""
    with session(as_json) as to:
        to.rows(to.api.call("ListDatasets"), "datasets", "id", "name", "source", "identifier", "split", "size_bytes")


@datasets.command("show")
def show_dataset(dataset_id: str, as_json: Json = False) -> None:
    """One dataset."""
    with session(as_json) as to:
        to.show(to.api.call("GetDataset", id=dataset_id))


@datasets.command("delete")
def delete_dataset(dataset_id: str, as_json: Json = False) -> None:
    """Delete a dataset; files below a root stay."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteDataset", id=dataset_id))


def list_devices(as_json: Json = False) -> None:
    """Devices with their budgets and what is on them."""
    with session(as_json) as to:
        columns = ("name", "kind", "budget_bytes", "used_bytes", "reserved_bytes", "services", "alive")
        to.rows(to.api.call("ListDevices"), "devices", *columns)


@jobs.command("list")
def list_jobs(as_json: Json = False) -> None:
    """Jobs, newest first."""
    with session(as_json) as to:
        to.rows(to.api.call("ListJobs"), "jobs", "id", "kind", "status", "progress", "waiting_for", "error_code")


@jobs.command("show")
def show_job(job_id: str, as_json: Json = False) -> None:
    """One job."""
    with session(as_json) as to:
        to.show(to.api.call("GetJob", id=job_id))


@jobs.command("wait")
def wait_job(job_id: str, as_json: Json = False) -> None:
    """Follow a job until it ends; fails when the job does."""
    with session(as_json) as to:
        wait_for_job(to.api, job_id, "job", to.console)
        to.show(to.api.call("GetJob", id=job_id))


@jobs.command("cancel")
def cancel_job(job_id: str, as_json: Json = False) -> None:
    """Stop a job within one batch."""
    with session(as_json) as to:
        to.show(to.api.call("CancelJob", id=job_id))


@jobs.command("retry")
def retry_job(job_id: str, as_json: Json = False) -> None:
    """Queue a failed or cancelled job again."""
    with session(as_json) as to:
        to.show(to.api.call("RetryJob", id=job_id))
