"""Between the protos and the domain's records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lensmesh.common.v1 import types_pb2
from lensmesh.extraction.v1 import extraction_pb2 as pb

from services.extraction.domain import Cache, Extraction, Filter, IfUnloaded, Mode, Planned, Wanted, WantedStream
from services.extraction.operations import Damage
from services.extraction.streaming import Facts, Part
from services.kit.paging import Page, asked
from services.residency.shards import Layout
from services.residency.texts import SpecialTokens

LAYOUTS: Mapping[int, Layout | None] = {
    pb.LAYOUT_UNSPECIFIED: None,
    pb.LAYOUT_ROWS: "rows",
    pb.LAYOUT_SEQUENCES: "sequences",
}
DTYPES: Mapping[int, str] = {
    types_pb2.DTYPE_UNSPECIFIED: "",
    types_pb2.DTYPE_FLOAT32: "float32",
    types_pb2.DTYPE_BFLOAT16: "bfloat16",
    types_pb2.DTYPE_FLOAT16: "float16",
}

SPECIAL_TOKENS: Mapping[int, SpecialTokens] = {
    pb.SPECIAL_TOKENS_UNSPECIFIED: "tokenizer",
    pb.SPECIAL_TOKENS_TOKENIZER: "tokenizer",
    pb.SPECIAL_TOKENS_NONE: "none",
    pb.SPECIAL_TOKENS_BOS: "bos",
}


IF_UNLOADED: Mapping[int, IfUnloaded] = {
    pb.IF_UNLOADED_UNSPECIFIED: "load",
    pb.IF_UNLOADED_LOAD: "load",
    pb.IF_UNLOADED_WAIT: "wait",
    pb.IF_UNLOADED_FAIL: "fail",
}


MODES: Mapping[int, Mode] = {
    pb.EXTRACTION_MODE_UNSPECIFIED: "auto",
    pb.EXTRACTION_MODE_FULL: "full",
    pb.EXTRACTION_MODE_SAFE: "safe",
    pb.EXTRACTION_MODE_CPU: "cpu",
    pb.EXTRACTION_MODE_AUTO: "auto",
}


def wanted(request: pb.ExtractActivationsRequest) -> Wanted:
    """What a request asks for."""
    return Wanted(
        model_id=request.model_id,
        dataset_id=request.dataset_id,
        layer_indices=tuple(request.layer_indices),
        hook_points=tuple(request.hook_points),
        sites=tuple(request.sites),
        layout=LAYOUTS[request.layout],
        sample_count=request.sample_count if request.HasField("sample_count") else None,
        batch_size=request.batch_size,
        max_length=request.max_length,
        dtype=DTYPES[request.dtype],
        extension_id=request.extension_id,
        seed=request.seed,
        max_tokens=request.max_tokens,
        apply_rmsnorm_scaling=request.apply_rmsnorm_scaling,
        special_tokens=SPECIAL_TOKENS[request.special_tokens],
        packing=request.packing,
        if_unloaded=IF_UNLOADED[request.if_unloaded],
        mode=MODES[request.mode],
        keep_order=request.keep_order,
    )


def wanted_stream(request: pb.StreamActivationsRequest) -> WantedStream:
    """What a stream's reader asks for."""
    return WantedStream(
        wanted=wanted(request.extraction),
        cursor=request.cursor,
        offset=request.offset,
        rows=request.rows,
        buffer_bytes=request.buffer_bytes,
        place=request.place,
    )


def stream_facts(facts: Facts) -> pb.StreamActivationsResponse:
    """The first message of a stream."""
    return pb.StreamActivationsResponse(
        facts=pb.StreamedActivations(
            hook_points=facts.hook_points,
            widths=facts.widths,
            dtype=types_pb2.Dtype.Value(f"DTYPE_{facts.dtype.upper()}"),
            rows_per_pass=facts.rows_per_pass,
            by_handle=facts.by_handle,
            model_digest=facts.model_digest,
            identity_error=facts.identity_error,
        )
    )


def stream_part(part: Part) -> pb.StreamActivationsResponse:
    """A block, or a chunk of one."""
    return pb.StreamActivationsResponse(
        block=pb.ActivationBlock(
            first_row=part.first_row,
            rows=part.rows,
            size_bytes=part.size_bytes,
            handle=part.handle,
            offset=part.offset,
            chunk=part.chunk,
        )
    )


def wanted_page(request: pb.ListExtractionsRequest | pb.ListActivationCachesRequest) -> Filter:
    """Which page a request asks for."""
    status = ""
    if isinstance(request, pb.ListExtractionsRequest) and request.status:
        status = pb.ExtractionStatus.Name(request.status).removeprefix("EXTRACTION_STATUS_").lower()
    return Filter(model_id=request.model_id, status=status, **asked(request))


def planned(plan: Planned) -> pb.ExtractActivationsResponse:
    """The answer to `validate_only`."""
    return pb.ExtractActivationsResponse(
        estimated_time_seconds=plan.estimate.seconds if plan.match == "miss" else 0.0,
        estimated_bytes=plan.estimate.size_bytes if plan.match == "miss" else 0,
        cache=pb.CacheMatch.Value(f"CACHE_MATCH_{plan.match.upper()}"),
        fits_limit=plan.fits_limit,
        message="Nothing was started",
    )


def started(extraction: Extraction) -> pb.ExtractActivationsResponse:
    """The answer to a request that was accepted: the same whether a worker has claimed it by now or not."""
    told = extraction if extraction.reused else replace(extraction, status="queued")
    return pb.ExtractActivationsResponse(
        extraction_id=told.id,
        status=_status(told),
        estimated_time_seconds=0.0 if told.reused else told.estimated_seconds,
        message=told.message,
    )


def extraction_message(extraction: Extraction) -> pb.Extraction:
    """One extraction."""
    return pb.Extraction(
        extraction_id=extraction.id,
        model_id=extraction.model_id,
        dataset_id=extraction.dataset_id,
        status=_status(extraction),
        progress=extraction.progress,
        cache_id=extraction.cache_id,
        storage_uri=extraction.storage_uri,
        file_size_bytes=extraction.size_bytes,
        extraction_time_seconds=extraction.seconds,
        samples_processed=extraction.samples_processed,
        total_samples=extraction.total_samples,
        tokens=extraction.tokens,
        activation_shape=extraction.activation_shape,
        reused=extraction.reused,
        message=extraction.message,
        hook_points=extraction.hook_points,
        error_code=extraction.error_code,
        error_message=extraction.error_message,
        waiting_for=extraction.waiting_for,
        job_id=extraction.job_id or "",
        created_by=extraction.created_by,
        created_at=extraction.created_at,
        finished_at=extraction.finished_at,
        tokens_per_second=extraction.tokens_per_second,
        identity_error=extraction.identity_error,
    )


def extraction_page(page: Page) -> pb.ListExtractionsResponse:
    """A page of extractions."""
    return pb.ListExtractionsResponse(extractions=[extraction_message(item) for item in page.items], **page.fields())


def cache_message(cache: Cache, *, with_shards: bool = True) -> pb.ActivationCache:
    """One cache; lists leave its shards out."""
    manifest = cache.manifest
    points, model, extension = manifest["hook_points"], manifest["model"], manifest["extension"]
    dataset = manifest["dataset"]
    return pb.ActivationCache(
        id=cache.id,
        model_id=cache.model_id,
        dataset_id=cache.dataset_id or "",
        hook_points=cache.hook_points,
        layout=pb.Layout.Value(f"LAYOUT_{manifest['layout'].upper()}"),
        dtype=types_pb2.Dtype.Value(f"DTYPE_{manifest['dtype'].upper()}"),
        tokens=manifest["tokens"],
        samples=manifest["samples"],
        max_length=manifest["max_length"],
        size_bytes=cache.size_bytes,
        storage_uri=cache.storage_uri,
        model_digest=model["digest"],
        revision=model["revision"],
        quantization=types_pb2.Quantization.Value(f"QUANTIZATION_{model['quantization'].upper()}"),
        extension_id=extension["id"] if extension else None,
        shards=[_shard(index, shard) for index, shard in enumerate(manifest["shards"])] if with_shards else [],
        statistics=[_statistics(point) for point in points],
        created_at=cache.created_at,
        last_accessed_at=cache.last_accessed_at,
        rows_read=dataset["rows_read"],
        bad_rows=dataset["bad_rows"],
        truncated_rows=dataset["truncated_rows"],
        truncated_tokens=dataset["truncated_tokens"],
    )


def cache_page(page: Page) -> pb.ListActivationCachesResponse:
    """A page of caches."""
    caches = [cache_message(item, with_shards=False) for item in page.items]
    return pb.ListActivationCachesResponse(activation_caches=caches, **page.fields())


def opened(cache: Cache) -> pb.OpenedCache:
    """A cache for a reader on the same host."""
    widths = [point["width"] for point in cache.manifest["hook_points"]]
    return pb.OpenedCache(cache=cache_message(cache), widths=widths)


def problem(damage: Damage) -> pb.ShardProblem:
    """A file that is not intact."""
    return pb.ShardProblem(index=damage.index, file=damage.file, problem=damage.problem)


def _status(extraction: Extraction) -> pb.ExtractionStatus:
    return pb.ExtractionStatus.Value(f"EXTRACTION_STATUS_{extraction.status.upper()}")


def _shard(index: int, shard: Mapping[str, Any]) -> pb.Shard:
    return pb.Shard(index=index, rows=shard["rows"], size_bytes=shard["size_bytes"], digest=shard["digest"])


def _statistics(point: Mapping[str, Any]) -> pb.HookPointStatistics:
    return pb.HookPointStatistics(
        hook_point=point["name"], width=point["width"], mean_norm=point["mean_norm"], variance=point["variance"]
    )
