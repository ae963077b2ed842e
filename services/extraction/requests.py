"""What a request means for a model and a dataset: every default filled in, every wrong field named."""

from __future__ import annotations

from collections.abc import Sequence

from services.extraction.compute.capture import PAIR_INPUTS
from services.extraction.domain import BaseModel, Estimate, Options, Rates, Survey, Wanted
from services.kit import errors
from services.residency.families import (
    SITES,
    Facts,
    UnknownHookPoint,
    facts,
    hook_points,
    require_site,
    site_of,
    width_of,
)
from services.residency.layouts import family_of_config
from services.residency.shards import DTYPES, Layout

DEFAULT_SITES = ("resid_post",)
MOST_DEFAULT_LENGTH = 1024
BYTES_PER_TOKEN = 3.5
"""Of text, where no extraction of a dataset has told better."""
FLOPS = {"cpu": 5e10, "cuda": 2e13}
"""Operations per second assumed of a device until the first extraction has told better."""
_QUANTIZED_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def resolve(wanted: Wanted, model: BaseModel, dataset: Survey, extension_uri: str = "") -> Options:
    """The options of a request; `extension_uri` is the handle of its extension's files.

    Raises:
        errors.Invalid: a field is wrong by itself or for this model or dataset; it is named.
        errors.Conflict: the model's files were not read yet.
        errors.Unsupported: the model has no hook points.
    """
    if not model.config:
        raise errors.Conflict("the model's files were not read yet; load it once", metadata={"model_id": model.id})
    if model.config.get("is_encoder_decoder") and family_of_config(model.config) is None:
        message = f"models of type {model.model_type} have no hook points"
        raise errors.Unsupported(message, violations=[("model_id", message)])
    if dataset.rows is not None and wanted.sample_count is not None and wanted.sample_count > dataset.rows:
        raise errors.Invalid.of("sample_count", f"the dataset has {dataset.rows} rows", rows=dataset.rows)
    if wanted.max_length > model.context_length:
        raise errors.Invalid.of(
            "max_length",
            f"the model's context is {model.context_length} tokens",
            context_length=model.context_length,
        )
    chosen = _scaled(_hook_points(wanted, model), wanted, model)
    layout = wanted.layout or _layout(chosen)
    if wanted.keep_order and layout != "rows":
        raise errors.Invalid.of("keep_order", "belongs to the layout rows; sequences are in their order anyway")
    return Options(
        hook_points=chosen,
        layout=layout,
        dtype=wanted.dtype or _dtype(model),
        batch_size=wanted.batch_size or model.batch_size,
        max_length=wanted.max_length or min(model.context_length, MOST_DEFAULT_LENGTH),
        sample_count=wanted.sample_count,
        max_tokens=wanted.max_tokens,
        extension_id=wanted.extension_id,
        extension_uri=extension_uri,
        seed=wanted.seed,
        special_tokens=wanted.special_tokens,
        packing=wanted.packing,
        if_unloaded=wanted.if_unloaded,
        mode=wanted.mode,
        keep_order=wanted.keep_order,
    )


def estimate(options: Options, model: BaseModel, dataset: Survey, *, rates: Rates, device: str) -> Estimate:
    """Seconds, bytes and samples that an extraction is expected to take."""
    by_size = dataset.size_bytes / BYTES_PER_TOKEN
    rows = dataset.rows or options.sample_count or max(1, int(by_size / options.max_length))
    samples = min(rows, options.sample_count or rows)
    per_sample = rates.tokens_per_sample or max(1.0, by_size / rows)
    if not options.packing:
        per_sample = min(per_sample, options.max_length)
    tokens = samples * per_sample
    if options.max_tokens:
        tokens = min(tokens, options.max_tokens)
    padded = options.layout == "sequences" and not options.packing
    stored = samples * options.max_length if padded else tokens
    per_token = row_bytes(options, facts(model.config), options.max_length)
    depth = max(_depth(name, model) for name in options.hook_points)
    guess = FLOPS["cuda" if device.startswith("cuda") else "cpu"] / (2 * max(1, model.parameter_count) * depth)
    return Estimate(
        seconds=round(rates.overhead_seconds + tokens / (rates.tokens_per_second or guess), 3),
        size_bytes=int(stored * per_token),
        samples=samples,
    )


def row_bytes(options: Options, known: Facts, max_length: int) -> int:
    """Bytes of all hook points' vectors of one token, in sequences of at most `max_length` tokens."""
    return sum(widths(options.hook_points, known, max_length)) * DTYPES[options.dtype].itemsize


def widths(names: Sequence[str], known: Facts, max_length: int) -> list[int]:
    """Numbers per token at each hook point, in sequences of at most `max_length` tokens."""
    return [width_of(site_of(name)[1], known, max_length) for name in names]


def _hook_points(wanted: Wanted, model: BaseModel) -> tuple[str, ...]:
    if wanted.hook_points:
        for other in ("layer_indices", "sites"):
            if getattr(wanted, other):
                raise errors.Invalid.of(other, "give either hook_points, or layer_indices with sites")
        for name in wanted.hook_points:
            _check_hook_point(name, wanted, model)
        return wanted.hook_points
    if not wanted.layer_indices:
        raise errors.Invalid.of("layer_indices", "give layer_indices or hook_points")
    for layer in wanted.layer_indices:
        _check_layer("layer_indices", layer, model)
    for site in wanted.sites:
        if site not in SITES:
            raise errors.Invalid.of("sites", f"unknown site {site!r}; known: {', '.join(SITES)}")
        _check_site("sites", site, model)
    return tuple(hook_points(wanted.sites or DEFAULT_SITES, wanted.layer_indices))


def _scaled(names: tuple[str, ...], wanted: Wanted, model: BaseModel) -> tuple[str, ...]:
    """With `apply_rmsnorm_scaling`, x/rms times the norm's gain is, bit for bit, what the MLP consumes."""
    if not wanted.apply_rmsnorm_scaling:
        return names
    if not any(site_of(name)[1] == "ln2_normalized" for name in names):
        raise errors.Invalid.of("apply_rmsnorm_scaling", "belongs to the site ln2_normalized")
    family = family_of_config(model.config)
    if family is None or not family.rms_norm:
        raise errors.Invalid.of(
            "apply_rmsnorm_scaling", f"the norm of {model.model_type} is no RMSNorm; use the site mlp_in"
        )
    normalized, consumed = SITES["ln2_normalized"], SITES["mlp_in"]
    return tuple(dict.fromkeys(name.replace(normalized, consumed) for name in names))


def _check_hook_point(name: str, wanted: Wanted, model: BaseModel) -> None:
    try:
        layer, site = site_of(name)
    except UnknownHookPoint as error:
        raise errors.Invalid.of("hook_points", str(error)) from error
    _check_site("hook_points", site, model)
    if isinstance(layer, int):
        _check_layer("hook_points", layer, model)
    elif not wanted.extension_id:
        raise errors.Invalid.of("hook_points", f"layer {layer} is no layer of the model; extensions have such layers")


def _check_site(field: str, site: str, model: BaseModel) -> None:
    family = family_of_config(model.config)
    try:
        if family is not None:
            require_site(family, site)
    except UnknownHookPoint as error:
        raise errors.Invalid.of(field, str(error)) from error


def _check_layer(field: str, layer: int, model: BaseModel) -> None:
    if not 0 <= layer < model.num_layers:
        raise errors.Invalid.of(
            field, f"layer {layer} is not one of the model's, 0 to {model.num_layers - 1}", num_layers=model.num_layers
        )


def _layout(names: tuple[str, ...]) -> Layout:
    """`rows` where every hook point is the input or the output of a whole MLP pair."""
    sites: dict[object, set[str]] = {}
    for layer, site in map(site_of, names):
        sites.setdefault(layer, set()).add(site)
    pairs = all("mlp_out" in found and found & PAIR_INPUTS for found in sites.values())
    return "rows" if pairs and all(found <= {"mlp_out", *PAIR_INPUTS} for found in sites.values()) else "sequences"


def _dtype(model: BaseModel) -> str:
    if model.quantization in _QUANTIZED_DTYPES:
        return _QUANTIZED_DTYPES[model.quantization]
    own = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
    return own if own in DTYPES else "float32"


def _depth(name: str, model: BaseModel) -> float:
    """Share of the model's layers that a forward pass runs to reach a hook point."""
    layer = site_of(name)[0]
    return (layer + 1) / model.num_layers if isinstance(layer, int) else 1.0
