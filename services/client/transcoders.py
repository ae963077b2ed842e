"""`lensmesh transcoders`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from services.client.output import Json, Session, session
from services.client.progress import wait_for_job

transcoders = typer.Typer(help="Trained transcoders and other tools' files of them.", no_args_is_help=True)

Format = Annotated[
    str, typer.Option("--format", help="sae_lens, sparsify, circuit_tracer, gemma_scope; to export also neuronpedia.")
]
COMPARED = (
    "transcoder_id",
    "coder",
    "fvu",
    "fvu_standard_error",
    "l0",
    "dead_fraction",
    "ce_recovered",
    "kl",
    "tokens",
)


@transcoders.command("list")
def list_transcoders(model: str = "", as_json: Json = False) -> None:
    """Transcoders, newest first."""
    with session(as_json) as to:
        columns = (
            "id",
            "name",
            "layer",
            "source_hook_point",
            "legacy_source",
            "dict_size",
            "top_k",
            "activation",
            "train_fvu",
        )
        to.rows(to.api.call("ListTranscoders", model_id=model), "transcoders", *columns)


@transcoders.command("show")
def show_transcoder(transcoder_id: str, as_json: Json = False) -> None:
    """One transcoder."""
    with session(as_json) as to:
        to.show(to.api.call("GetTranscoder", id=transcoder_id))


@transcoders.command("delete")
def delete_transcoder(transcoder_id: str, as_json: Json = False) -> None:
    """Delete a transcoder, its evaluations and its exports."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteTranscoder", id=transcoder_id))


@transcoders.command("export")
def export_transcoder(
    transcoder_id: str,
    *,
    format_: Format,
    to_folder: Annotated[Path | None, typer.Option("--to", help="Folder to download the files into.")] = None,
    prefix: Annotated[int, typer.Option(help="Only that many groups; all when 0.")] = 0,
    cache: Annotated[str, typer.Option(help="Cache to calibrate thresholds on; its own when left out.")] = "",
    as_json: Json = False,
) -> None:
    """Write a transcoder as another tool's files; says what the conversion cost."""
    with session(as_json) as to:
        fields = {"format": format_, "prefix": prefix, "cache_id": cache}
        made = to.api.call("ExportTranscoder", id=transcoder_id, **fields)
        if to_folder is not None:
            _download(to, made, to_folder)
        to.show(made)


@transcoders.command("feature")
def show_feature(transcoder_id: str, feature: int, as_json: Json = False) -> None:
    """One latent: its strongest contexts, its effect on the logits, its neighbours; evaluate with --samples first."""
    with session(as_json) as to:
        to.show(to.api.call("GetFeature", id=transcoder_id, feature=feature))


@transcoders.command("import")
def import_transcoder(
    identifier: Annotated[str, typer.Argument(help="Directory below a model root, or hub repository.")],
    *,
    model: Annotated[str, typer.Option(help="Model that it belongs to.")],
    format_: Format,
    source: Annotated[str, typer.Option(help="local or huggingface.")] = "local",
    revision: str = "",
    subfolder: str = "",
    layer: Annotated[int | None, typer.Option(help="Where the files hold several or do not say it.")] = None,
    name: str = "",
    as_json: Json = False,
) -> None:
    """Make a transcoder of another tool's files."""
    with session(as_json) as to:
        fields: dict[str, Any] = {"model_id": model, "format": format_, "source": source, "identifier": identifier}
        fields |= {"revision": revision, "subfolder": subfolder, "name": name}
        to.show(to.api.call("ImportTranscoder", **fields, **({} if layer is None else {"layer": layer})))


@transcoders.command("compare")
def compare_transcoders(
    transcoder_ids: Annotated[list[str] | None, typer.Argument()] = None,
    *,
    dataset: Annotated[str, typer.Option(help="Dataset with held-out text.")],
    mode: Annotated[str, typer.Option(help="full, safe, cpu or auto.")] = "auto",
    batches: Annotated[int, typer.Option(help="Batches; by mode when 0.")] = 0,
    prefix: Annotated[int, typer.Option(help="Only that many groups of every dictionary; all when 0.")] = 0,
    checkpoint: Annotated[list[str] | None, typer.Option(help="JOB, JOB/CHECKPOINT or JOB/CHECKPOINT/CODER.")] = None,
    devices: Annotated[int, typer.Option(help="Split a model that no device holds alone over so many.")] = 0,
    as_json: Json = False,
) -> None:
    """Judge several transcoders, and checkpoints of trainings, on the same held-out text, side by side."""
    with session(as_json) as to:
        fields = {"transcoder_ids": transcoder_ids or [], "dataset_id": dataset, "mode": mode, "num_batches": batches}
        names = ("job_id", "checkpoint", "coder")
        fields["checkpoints"] = [dict(zip(names, one.split("/", 2), strict=False)) for one in checkpoint or ()]
        to.rows(judged(to, **fields, prefix=prefix, devices=devices), "evaluations", *COMPARED)


def judged(to: Session, **fields: Any) -> dict[str, Any]:
    """The evaluations of a comparison, once they have ended."""
    queued = to.api.call("CompareTranscoders", **fields)["compared"]
    for one in queued:
        what = one["transcoder_id"] or f"{one['coder']} of {one['checkpoint']}"
        wait_for_job(to.api, one["job_id"], f"evaluate {what}", to.console)
    return to.api.call("GetEvaluations", ids=[one["evaluation_id"] for one in queued])


def _download(to: Session, made: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in made["files"]:
        name = Path(file["name"]).name
        with (folder / name).open("wb") as written:
            for piece in to.api.read("ReadExportedFile", digest=made["digest"], name=name):
                written.write(piece)
