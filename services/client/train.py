"""`lensmesh train MODEL_ID …`, and what is done with trainings: `lensmesh train list`, `clone`, `prune` and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from services.client.output import Json, Session, print_json, session
from services.client.progress import wait_for_job
from services.client.transcoders import COMPARED, judged
from services.client.work import Layers, numbers

JobId = Annotated[str, typer.Argument(help="Training job, `job_…`.")]
Wait = Annotated[bool, typer.Option(help="Follow it to its end.")]


class _StartByDefault(TyperGroup):
    """`train m_x` is `train start m_x`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["start", *args]
        return super().parse_args(ctx, args)


trainings = typer.Typer(
    cls=_StartByDefault, help="Train transcoders: `train MODEL_ID --layers …`.", no_args_is_help=True
)


@trainings.command("start")
def start_training(
    model_id: str,
    *,
    layers: Layers,
    cache: Annotated[str, typer.Option(help="Activation cache to train from.")] = "",
    dataset: Annotated[str, typer.Option(help="Dataset to extract from first; instead of --cache.")] = "",
    live: Annotated[bool, typer.Option("--live", help="With --dataset: compute it while training.")] = False,
    split: Annotated[bool, typer.Option("--split", help="With --live: spread the model over --devices.")] = False,
    dict_size: Annotated[int, typer.Option(help="Latents; 16 times the width when 0.")] = 0,
    group_sizes: Annotated[str, typer.Option(help="Increments of the nested groups, comma-separated.")] = "",
    top_k: Annotated[int | None, typer.Option(help="Active latents per token; dict_size / 200 when left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; the cache once when 0.")] = 0,
    devices: Annotated[int, typer.Option(help="Devices to train on together.")] = 1,
    tracker: Annotated[str, typer.Option(help="Tell wandb or trackio as well.")] = "",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train one Matryoshka transcoder per layer; the bar shows FVU."""
    with session(as_json) as to:
        source: dict[str, Any] = {"cache_id": cache} if cache else {"dataset_id": dataset}
        source |= {name: True for name, given in (("live", live), ("split", split)) if given}
        job = to.api.call(
            "CreateTrainingJob",
            model_id=model_id,
            layers=numbers(layers),
            source=source,
            dict_size=dict_size,
            group_sizes=numbers(group_sizes),
            num_tokens=tokens,
            devices=devices,
            tracker=tracker,
            seed=seed,
            **({} if top_k is None else {"top_k": top_k}),
        )
        _followed(to, job["id"])


@trainings.command("sites")
def compare_sites(
    model_id: str,
    *,
    layers: Layers,
    dataset: Annotated[str, typer.Option(help="Dataset to train on.")],
    held_out: Annotated[str, typer.Option(help="Dataset with other text, to judge on.")],
    dict_size: Annotated[int, typer.Option(help="Latents; 16 times the width when 0.")] = 0,
    top_k: Annotated[int | None, typer.Option(help="Active latents per token; dict_size / 200 when left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; the dataset once when 0.")] = 0,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train from mlp_in and from the older resid_mid on the same rows, and judge both on the same held-out text."""
    with session(as_json) as to:
        job = to.api.call(
            "CreateTrainingJob",
            model_id=model_id,
            layers=numbers(layers),
            source={"dataset_id": dataset},
            source_site="mlp_in",
            variants=[{"source_site": "resid_mid"}],
            dict_size=dict_size,
            num_tokens=tokens,
            seed=seed,
            **({} if top_k is None else {"top_k": top_k}),
        )
        wait_for_job(to.api, job["id"], "train", to.console)
        made = to.api.call("GetTrainingJob", id=job["id"])["transcoder_ids"]
        found = judged(to, transcoder_ids=made, dataset_id=held_out)
        of = {one: to.api.call("GetTranscoder", id=one)["source_hook_point"] for one in made}
        for one in found["evaluations"]:
            one["source_hook_point"] = of[one["transcoder_id"]]
        to.rows(found, "evaluations", "source_hook_point", *COMPARED)


@trainings.command("list")
def list_trainings(model: Annotated[str, typer.Option(help="Only of this model.")] = "", as_json: Json = False) -> None:
    """Trainings, newest first."""
    with session(as_json) as to:
        reply = to.api.call("ListTrainingJobs", model_id=model)
        to.rows(reply, "training_jobs", "id", "model_id", "layers", "status", "progress", "fvu", "waiting_for")


@trainings.command("show")
def show_training(job_id: JobId, as_json: Json = False) -> None:
    """One training with its figures and checkpoints."""
    with session(as_json) as to:
        to.show(to.api.call("GetTrainingJob", id=job_id))


@trainings.command("pause")
def pause_training(job_id: JobId, as_json: Json = False) -> None:
    """Stop a training for now, with a checkpoint."""
    with session(as_json) as to:
        to.show(to.api.call("PauseTrainingJob", id=job_id))


@trainings.command("resume")
def resume_training(job_id: JobId, wait: Wait = True, as_json: Json = False) -> None:
    """Let a paused training go on."""
    with session(as_json) as to:
        to.api.call("ResumeTrainingJob", id=job_id)
        _followed(to, job_id, wait)


@trainings.command("cancel")
def cancel_training(job_id: JobId, as_json: Json = False) -> None:
    """Stop a training for good; its checkpoints stay."""
    with session(as_json) as to:
        to.show(to.api.call("CancelTrainingJob", id=job_id))


@trainings.command("finalize")
def finalize_training(
    job_id: JobId,
    checkpoint: Annotated[str, typer.Option(help="Checkpoint id; the newest when left out.")] = "",
    as_json: Json = False,
) -> None:
    """Make transcoders of a checkpoint of a training that was stopped or has failed."""
    with session(as_json) as to:
        to.api.call("FinalizeTrainingJob", id=job_id, checkpoint=checkpoint)
        _followed(to, job_id)


@trainings.command("prune")
def prune_checkpoints(
    job_id: JobId,
    *,
    last: Annotated[int | None, typer.Option(help="Keep that many newest ones.")] = None,
    best: Annotated[int | None, typer.Option(help="Keep that many of the lowest FVU.")] = None,
    every: Annotated[int | None, typer.Option(help="Keep the first of every so many tokens.")] = None,
    apply: Annotated[bool, typer.Option(help="Delete; without it, only say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete checkpoints that a policy does not keep, the training's own when none is given."""
    given = {"last": last, "best": best, "every_tokens": every}
    policy = {name: value for name, value in given.items() if value is not None}
    with session(as_json) as to:
        fields = {"retention": policy} if policy else {}
        reply = to.api.call("PruneCheckpoints", id=job_id, validate_only=not apply, **fields)
        to.rows(reply, "deleted", "id", "step", "tokens_seen", "fvu", "size_bytes", "created_at")
        verb = "freed" if apply else "would be freed"
        to.console.print(f"{reply['freed_bytes']:,} bytes {verb}, {len(reply['kept'])} checkpoints are kept")


@trainings.command("export")
def export_config(
    job_id: JobId,
    file: Annotated[Path | None, typer.Argument(help="Standard output when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Write the configuration of a training as JSON, for `import`."""
    with session(as_json) as to:
        config = to.api.call("GetTrainingConfig", id=job_id)
        if file is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if file is None or as_json:
            print_json(config)


@trainings.command("import")
def import_config(
    file: Annotated[Path, typer.Argument(help="What `export` wrote.", exists=True, dir_okay=False)],
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Train what an exported configuration says."""
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{file.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{file.name} is no configuration")
    with session(as_json) as to:
        _followed(to, to.api.call("CreateTrainingJob", **config)["id"], wait)


@trainings.command("clone")
def clone_training(job_id: JobId, wait: Wait = True, as_json: Json = False) -> None:
    """Train the same once more."""
    with session(as_json) as to:
        _followed(to, to.api.call("CloneTrainingJob", id=job_id)["id"], wait)


def _followed(to: Session, job_id: str, wait: bool = True) -> None:
    """Show a training, at its end or as it is."""
    if wait:
        wait_for_job(to.api, job_id, "train", to.console)
    to.show(to.api.call("GetTrainingJob", id=job_id))
