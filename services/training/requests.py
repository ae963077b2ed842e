"""What a request means for a model: every default filled in, every wrong field named, bytes counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.kit import errors
from services.residency.families import FAMILIES, SITES
from services.residency.gang import CUDA_CONTEXT_BYTES
from services.residency.lenses.selection import block_rows
from services.residency.shards import CorruptCache, ShardReader
from services.training.compute.config import ConfigError, TrainConfig
from services.training.domain import BaseModel, Cache, CoderSpec, Plan, Sites, Training, Wanted

EXPANSION = 16
"""Latents per dimension when a request names no dict_size."""
DEFAULT_BATCH_SIZE = 2048
SHARED = ("batch_size", "num_tokens", "seed")
"""Fields that all configurations of a job have in common, since they share a stream."""
_FLOAT = 4


def resolve(wanted: Wanted, model: BaseModel, cache: Cache | None) -> Plan:
    """The plan of a request; `cache` is where it reads from, None where that has to be extracted first.

    Raises:
        errors.Invalid: a field is wrong by itself or for this model or cache; it is named.
        errors.Unsupported: the tracker is not installed here.
    """
    if wanted.tracker and find_spec(wanted.tracker) is None:
        raise errors.Unsupported(f"{wanted.tracker} is not installed", metadata={"tracker": wanted.tracker})
    for layer in wanted.layers:
        if layer >= model.num_layers:
            raise errors.Invalid.of("layers", f"layer {layer} is not one of the model's, 0 to {model.num_layers - 1}")
    coders = []
    for number, (sites, options, field) in enumerate(_configurations(wanted)):
        config = _config(options, model, field)
        for layer in wanted.layers:
            name = f"layer-{layer}" if number == 0 else f"layer-{layer}-variant-{number}"
            coders.append(_coder(name, layer, sites, model, config))
    plan = Plan(
        tuple(coders),
        wanted.options.get("num_tokens", 0),
        devices=wanted.devices or 1,
        tracker=wanted.tracker,
        live=wanted.live,
        split=wanted.split,
    )
    _check_devices(plan, wanted)
    if cache is not None:
        if cache.model_id != model.id and cache.model_digest != model.digest:
            raise errors.Invalid.of("source.cache_id", f"the cache is of model {cache.model_id}")
        check_cache(plan, cache)
    return plan


def _check_devices(plan: Plan, wanted: Wanted) -> None:
    if plan.live and not wanted.dataset_id:
        raise errors.Invalid.of("source.live", "needs a dataset: a cache is computed already")
    if plan.split and not plan.live:
        raise errors.Invalid.of("source.split", "needs source.live: nothing else runs the model in the training")
    if plan.split and plan.devices == 1:
        raise errors.Invalid.of("devices", "a model is split over two devices or more")
    if plan.live and plan.ranks > 1:
        raise errors.Invalid.of("devices", "a live stream feeds one device; source.split spreads the model over them")
    batch_size = plan.coders[0].config["batch_size"]
    if batch_size % plan.ranks:
        raise errors.Invalid.of("batch_size", f"{batch_size} rows cannot be shared evenly by {plan.ranks} devices")


def check_cache(plan: Plan, cache: Cache) -> None:
    """The cache holds what the plan reads.

    Raises:
        errors.Invalid: it lacks a hook point, or has less than one batch.
    """
    for point in plan.hook_points:
        if point not in cache.widths:
            raise errors.Invalid.of("source.cache_id", f"the cache does not hold {point}", hook_point=point)
    batch_size = plan.coders[0].config["batch_size"]
    if cache.tokens < batch_size:
        raise errors.Invalid.of("batch_size", f"{batch_size} is more than the cache's {cache.tokens} tokens")


def check_files(plan: Plan, folder: Path) -> None:
    """What the plan reads has one number format; files that are damaged are told by the job that reads them whole.

    Raises:
        errors.Invalid: there are several.
    """
    try:
        dtypes = ShardReader(folder).dtypes(plan.hook_points)
    except (CorruptCache, KeyError):
        return
    if len(dtypes) > 1:
        raise errors.Invalid.of("source.cache_id", f"the cache mixes {', '.join(sorted(dtypes))}")


def settled(plan: Plan, cache: Cache, threads: int) -> Plan:
    """The plan with what its data tells, the number of tokens and every rule, and the threads of its first start."""
    tokens = plan.num_tokens or cache.tokens
    coders = []
    for coder in plan.coders:
        config = TrainConfig(**{**coder.config, "num_tokens": tokens}).resolved(cache.widths[coder.target])
        coders.append(replace(coder, config=config.to_dict()))
    return replace(
        plan,
        coders=tuple(coders),
        num_tokens=tokens,
        base_digest=cache.model_digest,
        threads=plan.threads or threads,
    )


def memory_bytes(plan: Plan, widths: Mapping[str, int], device: str) -> int:
    """Bytes of each rank on its device: weights, gradients and moments of all coders, and its share of a batch."""
    kept = work = 0
    for coder in plan.coders:
        config = TrainConfig(**{**coder.config, "num_tokens": max(plan.num_tokens, coder.config["batch_size"])})
        d_in, d_out = widths[coder.source], widths[coder.target]
        weights = config.dict_size * (d_in + d_out + 1) + d_out + (d_in * d_out if config.skip else 0)
        kept += 4 * weights * _FLOAT
        rows = config.batch_size // plan.ranks
        width = 2 * d_in + (2 * len(config.groups) + 3) * d_out + 16 * config.shape.top_k
        block = block_rows(config.dict_size) * config.dict_size
        work = max(work, (rows * width + block) * _FLOAT)
    return kept + work + (CUDA_CONTEXT_BYTES if device.startswith("cuda") else 0)


def configurations(plan: Plan) -> list[CoderSpec]:
    """One coder of each configuration of a plan, in order."""
    return [coder for coder in plan.coders if coder.layer == plan.coders[0].layer]


def wanted_again(training: Training) -> Wanted:
    """The request for the same training, with nothing left open."""
    asked = [(_asked_sites(coder), _asked_options(coder)) for coder in configurations(training.plan)]
    (sites, options), *variants = asked
    if training.plan.num_tokens:
        options["num_tokens"] = training.plan.num_tokens
    return Wanted(
        model_id=training.model_id,
        layers=tuple(training.layers),
        cache_id="" if training.dataset_id else training.cache_id or "",
        dataset_id=training.dataset_id or "",
        sites=sites,
        options=options,
        variants=tuple(variants),
        devices=training.plan.devices,
        tracker=training.plan.tracker,
        retention=training.retention,
        live=training.plan.live,
        split=training.plan.split,
    )


def _asked_sites(coder: CoderSpec) -> Sites:
    scaling = coder.apply_rmsnorm_scaling if coder.source_site == "ln2_normalized" else None
    return Sites(coder.source_site, scaling, coder.target_site)


def _asked_options(coder: CoderSpec) -> dict[str, Any]:
    """All of its options but those that follow from the number of tokens, which is asked for once."""
    open_ones = ("num_tokens", "dead_after_tokens", "prefix_widths")
    options = {name: value for name, value in coder.config.items() if name not in open_ones}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _configurations(wanted: Wanted) -> list[tuple[Sites, Mapping[str, Any], str]]:
    """Sites, options and the field that a complaint is about, of every configuration of a request."""
    found: list[tuple[Sites, Mapping[str, Any], str]] = [(wanted.sites, wanted.options, "")]
    for index, (sites, options) in enumerate(wanted.variants):
        field = f"variants[{index}]."
        for name in SHARED:
            if name in options and options[name] != wanted.options.get(name, options[name]):
                raise errors.Invalid.of(f"{field}{name}", "has to be the same for all configurations of a job")
        merged = {**wanted.options, **options}
        if {"dict_size", "group_sizes", "prefix_widths"} & options.keys():
            merged = {name: value for name, value in merged.items() if name in options or not _groups(name)}
        found.append((_merged(wanted.sites, sites), merged, field))
    return found


def _groups(name: str) -> bool:
    return name in ("group_sizes", "prefix_widths")


def _merged(own: Sites, other: Sites) -> Sites:
    scaling = own.apply_rmsnorm_scaling if other.apply_rmsnorm_scaling is None else other.apply_rmsnorm_scaling
    return Sites(other.source_site or own.source_site, scaling, other.target_site or own.target_site)


def _config(options: Mapping[str, Any], model: BaseModel, field: str) -> dict[str, Any]:
    """A configuration that is valid whatever its data; `num_tokens` 0 stays, until the data is known.

    Raises:
        errors.Invalid: the wrong field, named with the prefix `field`.
    """
    given = {"dict_size": EXPANSION * model.hidden_size, "batch_size": DEFAULT_BATCH_SIZE, **options}
    tokens = given.get("num_tokens", 0)
    try:
        config = TrainConfig(**{**given, "num_tokens": tokens or given["batch_size"]}).resolved(model.hidden_size)
    except ConfigError as error:
        raise errors.Invalid.of(f"{field}{error.field}", error.description) from error
    by_length = ("dead_after_tokens", "learning_rate") if not tokens else ("dead_after_tokens",)
    return {**config.to_dict(), **{name: options.get(name) for name in by_length}, "num_tokens": tokens}


def _coder(name: str, layer: int, sites: Sites, model: BaseModel, config: Mapping[str, Any]) -> CoderSpec:
    source_site, target_site = sites.source_site or "mlp_in", sites.target_site or "mlp_out"
    scaling = source_site == "ln2_normalized" and sites.apply_rmsnorm_scaling is not False
    if sites.apply_rmsnorm_scaling is not None and source_site != "ln2_normalized":
        raise errors.Invalid.of("apply_rmsnorm_scaling", "belongs to source_site ln2_normalized")
    family = FAMILIES.get(model.model_type)
    if scaling and family is not None and not family.rms_norm:
        raise errors.Invalid.of(
            "apply_rmsnorm_scaling", f"the norm of {model.model_type} is no RMSNorm; use source_site mlp_in"
        )
    # x / rms times the gain is what the MLP consumes, bit for bit: the cache holds it under that name
    read = "mlp_in" if scaling else source_site
    return CoderSpec(
        name=name,
        layer=layer,
        source=f"blocks.{layer}.{SITES[read]}",
        target=f"blocks.{layer}.{SITES[target_site]}",
        source_hook_point=f"blocks.{layer}.{SITES[source_site]}",
        source_site=source_site,
        target_site=target_site,
        apply_rmsnorm_scaling=scaling,
        config=config,
    )


def batches_for(mode: str, weight_bytes: int) -> int:
    """Batches of an evaluation (spec/002): full 200, safe by the size of the model's weights, cpu 10."""
    if mode == "full":
        return 200
    if mode == "cpu":
        return 10
    limits: Sequence[tuple[int, int]] = ((10**9, 50), (2 * 10**9, 30), (6 * 10**9, 10), (20 * 10**9, 5))
    return next((batches for most, batches in limits if weight_bytes <= most), 3)
