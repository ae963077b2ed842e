"""Between the protos and the domain's records."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from lensmesh.common.v1 import types_pb2
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1.transcoders_pb2 import CompareTranscodersRequest

from services.kit import errors
from services.kit.paging import Page, asked
from services.residency.families import site_of
from services.training.domain import (
    LEGACY_SITE,
    Checkpoint,
    CoderSpec,
    Evaluation,
    Filter,
    Pruning,
    Retention,
    Sites,
    Training,
    Transcoder,
    Wanted,
    WantedEvaluation,
)
from services.training.requests import configurations

_ACTIVATIONS = {
    pb.ACTIVATION_TOPK: "topk",
    pb.ACTIVATION_BATCH_TOPK: "batch_topk",
    pb.ACTIVATION_JUMPRELU: "jumprelu",
}
_SCHEDULES = {
    pb.LR_SCHEDULE_CONSTANT: "constant",
    pb.LR_SCHEDULE_LINEAR: "linear",
    pb.LR_SCHEDULE_COSINE: "cosine",
}
_DTYPES = {types_pb2.DTYPE_FLOAT32: "float32", types_pb2.DTYPE_BFLOAT16: "bfloat16"}
MODES = {
    pb.EVALUATION_MODE_UNSPECIFIED: "auto",
    pb.EVALUATION_MODE_AUTO: "auto",
    pb.EVALUATION_MODE_FULL: "full",
    pb.EVALUATION_MODE_SAFE: "safe",
    pb.EVALUATION_MODE_CPU: "cpu",
}
_PLAIN = ("dict_size", "top_k", "batch_size", "num_tokens", "seed", "skip", "unit_norm_decoder")
_CODER = [field.name for field in pb.CoderProgress.DESCRIPTOR.fields]
_JOB = (
    "step", "tokens_seen", "tokens_per_second", "coder_tokens_per_second", "loss", "l2_loss", "aux_loss", "fvu",
    "fvu_min", "fvu_max", "fvu_mean", "fvu_per_prefix", "l0", "l0_per_prefix", "dead_fraction", "gradient_norm",
    "learning_rate", "eta_seconds",
)  # fmt: skip


def wanted(request: pb.CreateTrainingJobRequest) -> Wanted:
    """What a request asks for.

    Raises:
        errors.Invalid: a number format that nothing is trained in.
    """
    return Wanted(
        model_id=request.model_id,
        layers=tuple(request.layers),
        cache_id=request.source.cache_id,
        dataset_id=request.source.dataset_id,
        sites=_sites(request),
        options=_options(request, ""),
        variants=tuple(
            (_sites(one), _options(one, f"variants[{index}].")) for index, one in enumerate(request.variants)
        ),
        devices=request.devices,
        tracker=request.tracker,
        retention=retention(request),
        live=request.source.live,
        split=request.source.split,
    )


def wanted_message(found: Wanted) -> pb.CreateTrainingJobRequest:
    """The request that asks for this."""
    source = {"dataset_id": found.dataset_id} if found.dataset_id else {"cache_id": found.cache_id}
    return pb.CreateTrainingJobRequest(
        model_id=found.model_id,
        layers=found.layers,
        source=pb.TrainingSource(**source, live=found.live, split=found.split),
        devices=found.devices,
        tracker=found.tracker,
        retention=_retention(found.retention) if found.retention else None,
        variants=[pb.TrainingConfig(**_fields(sites, options)) for sites, options in found.variants],
        **_fields(found.sites, found.options),
    )


def retention(request: pb.CreateTrainingJobRequest | pb.PruneCheckpointsRequest) -> Retention | None:
    """The policy of a request, None where it gives none."""
    given = request.retention
    return Retention(given.last, given.best, given.every_tokens) if request.HasField("retention") else None


def pruning(found: Pruning) -> pb.PruneCheckpointsResponse:
    """What is kept and deleted."""
    return pb.PruneCheckpointsResponse(
        kept=[_checkpoint(one) for one in found.kept],
        deleted=[_checkpoint(one) for one in found.deleted],
        freed_bytes=sum(one.size_bytes for one in found.deleted),
    )


def wanted_evaluation(
    request: pb.EvaluateTranscoderRequest | CompareTranscodersRequest, transcoder_id: str, samples_per_feature: int = 0
) -> WantedEvaluation:
    """What a request asks for; of a comparison what its evaluations have in common."""
    return WantedEvaluation(
        transcoder_id=transcoder_id,
        dataset_id=request.dataset_id,
        num_batches=request.num_batches,
        batch_size=request.batch_size,
        max_length=request.max_length,
        mode=MODES[request.mode],
        prefix=request.prefix,
        samples_per_feature=samples_per_feature,
        devices=max(1, request.devices),
    )


def trainings_wanted(request: pb.ListTrainingJobsRequest) -> Filter:
    """Which page a request asks for."""
    status = ""
    if request.status:
        status = pb.TrainingStatus.Name(request.status).removeprefix("TRAINING_STATUS_").lower()
    return Filter(model_id=request.model_id, status=status, **asked(request))


def transcoders_wanted(request: pb.ListTranscodersRequest) -> Filter:
    """Which page a request asks for."""
    layer = request.layer if request.HasField("layer") else None
    return Filter(model_id=request.model_id, layer=layer, **asked(request))


def evaluations_wanted(request: pb.ListEvaluationsRequest) -> Filter:
    """Which page a request asks for."""
    return Filter(transcoder_id=request.id, **asked(request))


def training(found: Training) -> pb.TrainingJob:
    """One training."""
    figures = {name: found.figures[name] for name in _JOB if name in found.figures}
    config, *variants = [_config(coder, found.plan.num_tokens) for coder in configurations(found.plan)]
    return pb.TrainingJob(
        id=found.job_id,
        model_id=found.model_id,
        layers=found.layers,
        status=pb.TrainingStatus.Value(f"TRAINING_STATUS_{found.status.upper() or 'UNSPECIFIED'}"),
        progress=found.progress,
        config=config,
        variants=variants,
        devices=found.plan.devices,
        threads=found.plan.threads,
        retention=_retention(found.retention),
        live=found.plan.live,
        split=found.plan.split,
        cache_id=found.cache_id,
        num_tokens=found.plan.num_tokens,
        coders=[_coder(coder) for coder in found.figures.get("coders", ())],
        transcoder_ids=found.transcoder_ids,
        error_code=found.error_code,
        error_message=found.error_message,
        waiting_for=found.waiting_for,
        checkpoints=[_checkpoint(checkpoint) for checkpoint in found.checkpoints],
        created_by=found.created_by,
        created_at=found.created_at,
        finished_at=found.finished_at,
        estimated_memory_bytes=found.estimated_memory_bytes,
        **figures,
    )


def training_page(page: Page) -> pb.ListTrainingJobsResponse:
    """A page of trainings."""
    return pb.ListTrainingJobsResponse(training_jobs=[training(item) for item in page.items], **page.fields())


def metrics(job_id: str, points: list[dict[str, Any]]) -> pb.TrainingMetrics:
    """The history of a training."""
    return pb.TrainingMetrics(
        id=job_id,
        points=[
            pb.TrainingPoint(
                step=point["step"],
                tokens_seen=point["tokens_seen"],
                learning_rate=point["learning_rate"],
                tokens_per_second=point["tokens_per_second"],
                coder_tokens_per_second=point.get("coder_tokens_per_second"),
                coders=[_coder(coder) for coder in point["coders"]],
            )
            for point in points
        ],
    )


def transcoder(found: Transcoder) -> pb.Transcoder:
    """One transcoder."""
    return pb.Transcoder(
        id=found.id,
        name=found.name,
        model_id=found.model_id,
        layer=found.layer,
        source_hook_point=found.source_hook_point,
        target_hook_point=found.target_hook_point,
        job_id=found.job_id,
        d_in=found.d_in,
        d_out=found.d_out,
        dict_size=found.dict_size,
        group_sizes=found.group_sizes,
        prefix_widths=list(accumulate(found.group_sizes)),
        top_k=found.top_k,
        activation=pb.Activation.Value(f"ACTIVATION_{found.activation.upper()}"),
        artifact_uri=found.artifact_uri,
        size_bytes=found.size_bytes,
        base_digest=found.base_digest,
        tokens_seen=found.tokens_seen,
        train_fvu=found.train_fvu,
        legacy_source=site_of(found.source_hook_point)[1] == "resid_mid",
        created_by=found.created_by,
        created_at=found.created_at,
    )


def transcoder_page(page: Page) -> pb.ListTranscodersResponse:
    """A page of transcoders."""
    return pb.ListTranscodersResponse(transcoders=[transcoder(item) for item in page.items], **page.fields())


def evaluation(found: Evaluation) -> pb.Evaluation:
    """One evaluation."""
    figures = dict(found.figures)
    mode = pb.EvaluationMode.Value(f"EVALUATION_MODE_{figures.pop('mode').upper()}")
    return pb.Evaluation(
        id=found.id,
        transcoder_id=found.transcoder_id,
        training_job_id=found.training_id,
        checkpoint=found.checkpoint_id,
        coder=found.coder,
        dataset_id=found.dataset_id,
        job_id=found.job_id,
        created_at=found.created_at,
        mode=mode,
        **figures,
    )


def evaluation_page(page: Page) -> pb.ListEvaluationsResponse:
    """A page of evaluations."""
    return pb.ListEvaluationsResponse(evaluations=[evaluation(item) for item in page.items], **page.fields())


def _sites(given: pb.CreateTrainingJobRequest | pb.TrainingConfig) -> Sites:
    scaling = given.apply_rmsnorm_scaling if given.HasField("apply_rmsnorm_scaling") else None
    return Sites(given.source_site, scaling, given.target_site)


def _options(given: pb.CreateTrainingJobRequest | pb.TrainingConfig, field: str) -> dict[str, Any]:
    """The fields of a configuration that were given, under `TrainConfig`'s names."""
    options: dict[str, Any] = {name: getattr(given, name) for name in _PLAIN}
    options |= {name: tuple(getattr(given, name)) for name in ("group_sizes", "prefix_widths", "prefix_weights")}
    options = {name: value for name, value in options.items() if value}
    options |= {name: getattr(given, name) for name in ("aux_k", "learning_rate") if given.HasField(name)}
    if given.activation:
        options["activation"] = _ACTIVATIONS[given.activation]
    if given.lr_schedule:
        options["lr_schedule"] = _SCHEDULES[given.lr_schedule]
    if given.dtype:
        if given.dtype not in _DTYPES:
            raise errors.Invalid.of(f"{field}dtype", f"is none of {', '.join(_DTYPES.values())}")
        options["dtype"] = _DTYPES[given.dtype]
    return options


def _config(coder: CoderSpec, num_tokens: int) -> pb.TrainingConfig:
    """A configuration, both forms of its groups."""
    sites = Sites(coder.source_site, coder.apply_rmsnorm_scaling, coder.target_site)
    config = {**coder.config, "num_tokens": num_tokens, "prefix_widths": accumulate(coder.config["group_sizes"])}
    return pb.TrainingConfig(**_fields(sites, config), legacy=coder.source_site == LEGACY_SITE)


def _fields(sites: Sites, options: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round than `_sites` and `_options`."""
    names = (*_PLAIN, "group_sizes", "prefix_widths", "prefix_weights", "aux_k", "learning_rate")
    return {
        "source_site": sites.source_site,
        "apply_rmsnorm_scaling": sites.apply_rmsnorm_scaling,
        "target_site": sites.target_site,
        "activation": pb.Activation.Value(f"ACTIVATION_{options['activation'].upper()}"),
        "lr_schedule": pb.LrSchedule.Value(f"LR_SCHEDULE_{options['lr_schedule'].upper()}"),
        "dtype": types_pb2.Dtype.Value(f"DTYPE_{options['dtype'].upper()}"),
        **{name: options[name] for name in names if options.get(name) is not None},
    }


def _retention(found: Retention) -> pb.CheckpointRetention:
    return pb.CheckpointRetention(last=found.last, best=found.best, every_tokens=found.every_tokens)


def _coder(figures: Mapping[str, Any]) -> pb.CoderProgress:
    return pb.CoderProgress(**{name: figures[name] for name in _CODER if name in figures})


def _checkpoint(found: Checkpoint) -> pb.Checkpoint:
    return pb.Checkpoint(
        id=found.id,
        step=found.step,
        tokens_seen=found.tokens_seen,
        fvu=found.fvu,
        size_bytes=found.size_bytes,
        created_at=found.created_at,
    )
