"""`lensmesh extractions`, `lensmesh caches`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.client.output import Json, session
from services.client.progress import wait_for_job

extractions = typer.Typer(help="Jobs that turn datasets into activation caches.", no_args_is_help=True)
caches = typer.Typer(help="Activation caches.", no_args_is_help=True)

ExtractionId = Annotated[str, typer.Argument(help="Extraction id.")]
CacheId = Annotated[str, typer.Argument(help="Cache id.")]
OfModel = Annotated[str, typer.Option(help="Only of this model.")]


@extractions.command("list")
def list_extractions(model: OfModel = "", as_json: Json = False) -> None:
    """Extractions, newest first."""
    with session(as_json) as to:
        reply = to.api.call("ListExtractions", model_id=model)
        to.rows(reply, "extractions", "extraction_id", "model_id", "status", "progress", "cache_id", "waiting_for")


@extractions.command("show")
def show_extraction(extraction_id: ExtractionId, as_json: Json = False) -> None:
    """One extraction."""
    with session(as_json) as to:
        to.show(to.api.call("GetExtraction", id=extraction_id))


@extractions.command("pause")
def pause_extraction(extraction_id: ExtractionId, as_json: Json = False) -> None:
    """Stop an extraction for now; the units that are done stay."""
    with session(as_json) as to:
        to.show(to.api.call("PauseExtraction", id=extraction_id))


@extractions.command("resume")
def resume_extraction(
    extraction_id: ExtractionId,
    wait: Annotated[bool, typer.Option(help="Until it has ended.")] = True,
    as_json: Json = False,
) -> None:
    """Let a paused extraction go on behind its last unit."""
    with session(as_json) as to:
        extraction = to.api.call("ResumeExtraction", id=extraction_id)
        if wait:
            wait_for_job(to.api, extraction["job_id"], "extract", to.console)
            extraction = to.api.call("GetExtraction", id=extraction_id)
        to.show(extraction)


@extractions.command("cancel")
def cancel_extraction(extraction_id: ExtractionId, as_json: Json = False) -> None:
    """Stop an extraction for good."""
    with session(as_json) as to:
        to.show(to.api.call("CancelExtraction", id=extraction_id))


@caches.command("list")
def list_caches(model: OfModel = "", as_json: Json = False) -> None:
    """Activation caches, newest first."""
    with session(as_json) as to:
        reply = to.api.call("ListActivationCaches", model_id=model)
        to.rows(reply, "activation_caches", "id", "model_id", "hook_points", "tokens", "size_bytes", "created_at")


@caches.command("show")
def show_cache(cache_id: CacheId, as_json: Json = False) -> None:
    """One cache with its shards."""
    with session(as_json) as to:
        to.show(to.api.call("GetActivationCache", id=cache_id))


@caches.command("verify")
def verify_cache(cache_id: CacheId, as_json: Json = False) -> None:
    """Check every file against its digest; fails when one is not what was written."""
    with session(as_json) as to:
        found = to.api.call("VerifyActivationCache", id=cache_id)
        to.show(found)
    if not found.get("ok"):
        raise typer.Exit(1)


@caches.command("delete")
def delete_cache(cache_id: CacheId, as_json: Json = False) -> None:
    """Delete a cache and its files; refused while it is read."""
    with session(as_json) as to:
        to.show(to.api.call("DeleteActivationCache", id=cache_id))
