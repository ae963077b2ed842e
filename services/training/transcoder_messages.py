"""Between the protos of what is done with trained transcoders and the records of their decisions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from lensmesh.training.v1 import training_pb2
from lensmesh.training.v1 import transcoders_pb2 as pb

from services.kit import errors
from services.training.compute import Export
from services.training.compute.formats import HeldOut
from services.training.domain import Queued, WantedComparison, WantedEvaluation
from services.training.exchange import Published, WantedImport
from services.training.feature_files import FeatureSample
from services.training.messages import wanted_evaluation

FORMATS = {
    pb.TRANSCODER_FORMAT_SAE_LENS: "sae_lens",
    pb.TRANSCODER_FORMAT_SPARSIFY: "sparsify",
    pb.TRANSCODER_FORMAT_CIRCUIT_TRACER: "circuit_tracer",
    pb.TRANSCODER_FORMAT_GEMMA_SCOPE: "gemma_scope",
}
_SOURCES: dict[int, Literal["huggingface", "local"]] = {
    pb.TRANSCODER_SOURCE_UNSPECIFIED: "local",
    pb.TRANSCODER_SOURCE_LOCAL: "local",
    pb.TRANSCODER_SOURCE_HUGGINGFACE: "huggingface",
}


def wanted_import(request: pb.ImportTranscoderRequest) -> WantedImport:
    """What a request asks for.

    Raises:
        errors.Invalid: feature dashboards are no transcoder.
    """
    if request.format not in FORMATS:
        raise errors.Invalid.of("format", "feature dashboards hold no weights")
    return WantedImport(
        model_id=request.model_id,
        format=FORMATS[request.format],
        source=_SOURCES[request.source],
        identifier=request.identifier,
        revision=request.revision,
        subfolder=request.subfolder,
        layer=request.layer if request.HasField("layer") else None,
        name=request.name,
    )


def wanted_comparison(request: pb.CompareTranscodersRequest) -> WantedComparison:
    """What a request asks for."""
    return WantedComparison(
        transcoder_ids=tuple(request.transcoder_ids),
        checkpoints=[(one.job_id, one.checkpoint, one.coder) for one in request.checkpoints],
        common=wanted_evaluation(request, transcoder_id=""),
    )


def comparison(queued: list[tuple[WantedEvaluation, Queued]]) -> pb.CompareTranscodersResponse:
    """What was queued."""
    return pb.CompareTranscodersResponse(
        compared=[
            pb.ComparedTranscoder(
                transcoder_id=wanted.transcoder_id,
                training_job_id=wanted.training_id,
                checkpoint=wanted.checkpoint_id,
                coder=wanted.coder,
                evaluation_id=one.resource_id,
                job_id=one.job_id,
            )
            for wanted, one in queued
        ]
    )


def exported(request: pb.ExportTranscoderRequest, done: Export, published: Published) -> pb.TranscoderExport:
    """What was written, and what its conversion cost."""
    activation = done.transcoder.shape.activation
    return pb.TranscoderExport(
        transcoder_id=request.id,
        format=request.format,
        artifact_uri=published.uri,
        digest=published.uri.rpartition("/")[2],
        files=[pb.ExportedFile(name=name, size_bytes=size) for name, size in published.files],
        activation=training_pb2.Activation.Value(f"ACTIVATION_{activation.upper()}"),
        thresholds=done.thresholds,
        wanted_l0=done.wanted_l0,
        calibrated_l0=done.calibrated_l0,
        original=_held_out(done.original),
        converted=_held_out(done.converted),
    )


def dashboards(request: pb.ExportTranscoderRequest, published: Published) -> pb.TranscoderExport:
    """Feature dashboards that were written."""
    return pb.TranscoderExport(
        transcoder_id=request.id,
        format=request.format,
        artifact_uri=published.uri,
        digest=published.uri.rpartition("/")[2],
        files=[pb.ExportedFile(name=name, size_bytes=size) for name, size in published.files],
    )


def feature(request: pb.GetFeatureRequest, sample: FeatureSample, prefix: int, tokens: int) -> pb.Feature:
    """One latent."""
    return pb.Feature(
        transcoder_id=request.id,
        feature=sample.feature,
        prefix=prefix,
        density=sample.density,
        tokens=tokens,
        contexts=[pb.FeatureContext(**asdict(context)) for context in sample.contexts],
        top_logits=[pb.LogitEffect(token_id=t, token=text, value=v) for t, text, v in sample.top_logits],
        bottom_logits=[pb.LogitEffect(token_id=t, token=text, value=v) for t, text, v in sample.bottom_logits],
        nearest=[pb.NearbyFeature(feature=other, cosine=cosine) for other, cosine in sample.nearest],
    )


def _held_out(found: HeldOut | None) -> pb.HeldOutFigures | None:
    return None if found is None else pb.HeldOutFigures(l0=found.l0, fvu=found.fvu)
