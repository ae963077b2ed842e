"""Protos to our types and back; no decisions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf import json_format, struct_pb2
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import devices_pb2
from lensmesh.residency.v1 import residency_pb2

from services.kit import errors
from services.residency.estimate import Estimate, parameter_count
from services.residency.families import SITES, Facts, facts
from services.residency.intervention import Intervention, Op
from services.residency.layouts import Family, family_of_config
from services.residency.lenses import KINDS, Probability, Reading, Spec, TokenReading
from services.residency.lenses.transcoder import Transcoder
from services.residency.loading import config_of, skeleton, stored_dtype
from services.residency.operations import Generation, Loading, Measured
from services.residency.pool import Pool
from services.residency.resident import Attached, Resident
from services.residency.sources import Contents, Source

QUANTIZATIONS = {
    types_pb2.QUANTIZATION_NONE: "none",
    types_pb2.QUANTIZATION_FP16: "fp16",
    types_pb2.QUANTIZATION_BF16: "bf16",
    types_pb2.QUANTIZATION_INT8: "int8",
    types_pb2.QUANTIZATION_INT4: "int4",
}
_QUANTIZATION_VALUES = {name: value for value, name in QUANTIZATIONS.items()}
_DTYPES = {
    "float32": types_pb2.DTYPE_FLOAT32,
    "bfloat16": types_pb2.DTYPE_BFLOAT16,
    "float16": types_pb2.DTYPE_FLOAT16,
}
_OPS = {
    types_pb2.InterventionSpec.OP_REPLACE: "replace",
    types_pb2.InterventionSpec.OP_ADD: "add",
    types_pb2.InterventionSpec.OP_SCALE: "scale",
    types_pb2.InterventionSpec.OP_ZERO: "zero",
    types_pb2.InterventionSpec.OP_MEAN: "mean",
}

_KINDS = {types_pb2.MODEL_SOURCE_HUGGINGFACE: "huggingface", types_pb2.MODEL_SOURCE_CUSTOM: "custom"}


def source(message: residency_pb2.SourceSpec) -> Source:
    """Where a model's files come from."""
    return Source(cast(Any, _KINDS.get(message.source, "local")), message.identifier, message.revision)


def model_facts(found: Contents) -> residency_pb2.ModelFacts:
    """What a model's files hold."""
    known = facts(found.config)
    config = struct_pb2.Struct()
    json_format.ParseDict(found.config, config)
    model = skeleton(config_of(found.config), stored_dtype(found.entries))
    return residency_pb2.ModelFacts(
        config=config,
        model_type=known.model_type,
        architecture=next(iter(found.config.get("architectures") or []), ""),
        parameter_count=parameter_count(model, found.entries),
        hidden_size=known.hidden_size,
        num_layers=known.num_layers,
        vocab_size=known.vocab_size,
        context_length=known.context_length,
        file_bytes=sum(entry.nbytes for entry in found.entries),
        digest=found.digest,
        defaults=_defaults(known, family_of_config(found.config)),
    )


def _defaults(known: Facts, family: Family | None) -> types_pb2.ModelDefaults:
    points = {} if family is None else {site: f"blocks.{{layer}}.{SITES[site]}" for site in family.taps}
    return types_pb2.ModelDefaults(
        dict_size=known.dict_size,
        group_sizes=known.group_sizes,
        top_k=known.top_k,
        model_batch_size=known.model_batch_size,
        dtype=_DTYPES.get(known.dtype or "", types_pb2.DTYPE_UNSPECIFIED),
        hook_points=[types_pb2.HookPoint(site=site, name=name) for site, name in points.items()],
        experimental=family is None or family.experimental,
    )


def memory_estimate(found: Estimate) -> residency_pb2.MemoryEstimate:
    """Bytes by cause."""
    return residency_pb2.MemoryEstimate(
        required_bytes=found.required,
        breakdown=types_pb2.MemoryBreakdown(
            weights=found.weights,
            quantization_state=found.quantization_state,
            activations=found.activations,
            overhead=found.overhead,
        ),
    )


def hosted_lens(attached: Attached, *, parked: bool = False) -> devices_pb2.HostedLens:
    """A lens as its host sees it."""
    return devices_pb2.HostedLens(
        lens_id=attached.spec.lens_id,
        memory_bytes=attached.nbytes,
        leases=attached.leases,
        idle_seconds=time.monotonic() - attached.last_used,
        parked=parked,
    )


def hosted_model(resident: Resident) -> devices_pb2.HostedModel:
    """A model as its host sees it."""
    lenses = [hosted_lens(attached) for attached in resident.lenses.values()]
    return devices_pb2.HostedModel(
        model_id=resident.model_id,
        quantization=_QUANTIZATION_VALUES[resident.quantization],
        memory_bytes=resident.base_bytes,
        lenses=[*lenses, *(hosted_lens(attached, parked=True) for attached in resident.parked.values())],
        active_lens_id=resident.active,
        fingerprint=resident.fingerprint,
        leases=resident.leases,
        idle_seconds=time.monotonic() - resident.last_used,
        parked=resident.state == "parked",
    )


def load_progress(step: Loading) -> residency_pb2.LoadProgress:
    """One step of a load."""
    share = step.done / step.total if step.total else 1.0
    last = step.resident
    return residency_pb2.LoadProgress(
        percent=100.0 if last is not None else min(99.0, 100 * share),
        bytes_done=step.done,
        bytes_total=step.total,
        message="Ready" if last is not None else "Reading weights",
        model=hosted_model(last) if last is not None else None,
        seconds=step.seconds,
        digest=last.base.digest if last is not None else "",
    )


def perplexity_result(found: Measured, quantization: str) -> types_pb2.PerplexityResult:
    """What was measured."""
    return types_pb2.PerplexityResult(
        perplexity=found.result.perplexity,
        loss=found.result.loss,
        tokens=found.result.tokens,
        samples=found.samples,
        quantization=_QUANTIZATION_VALUES[quantization],
        seconds=found.seconds,
    )


def host_state(pool: Pool, incarnation: str) -> residency_pb2.HostState:
    """Everything on the device."""
    return residency_pb2.HostState(
        incarnation=incarnation,
        models=[hosted_model(resident) for resident in pool.residents],
        used_bytes=pool.used_bytes,
        budget_bytes=pool.budget_bytes,
    )


def kind_name(kind: int) -> str:
    """The registry key of a lens kind.

    Raises:
        errors.Unsupported: no module makes this kind.
    """
    name = types_pb2.LensKind.Name(kind).removeprefix("LENS_KIND_").lower()
    if name not in KINDS:
        raise errors.Unsupported(f"lenses of kind {name} cannot be attached")
    return name


def lens_spec(message: types_pb2.LensSpec) -> Spec:
    """What to attach, without the files behind its handle."""
    return Spec(
        lens_id=message.lens_id,
        kind=kind_name(message.kind),
        base_digest=message.base_digest,
        layer=message.layer if message.HasField("layer") else None,
        source_model_id=message.activation_source_model_id,
        artifact_uri=message.artifact_uri,
    )


def lens_reading(spec: Spec, reading: Reading, ids: Sequence[int], texts: Mapping[int, str]) -> types_pb2.LensReading:
    """A text as one lens reads it; `texts` has every token that occurs in it."""
    return types_pb2.LensReading(
        lens_id=spec.lens_id,
        kind=types_pb2.LensKind.Value(f"LENS_KIND_{spec.kind.upper()}"),
        tokens=[_token(i, ids[i], token, texts) for i, token in enumerate(reading.tokens)],
        fvu=reading.fvu,
    )


def _token(position: int, token_id: int, token: TokenReading, texts: Mapping[int, str]) -> types_pb2.TokenReading:
    return types_pb2.TokenReading(
        position=position,
        token_id=token_id,
        token=texts[token_id],
        features=[types_pb2.FeatureActivation(feature=latent, activation=value) for latent, value in token.features],
        fvu=token.fvu,
        layers=[types_pb2.LayerReadout(layer=n, predictions=_chances(rows, texts)) for n, rows in token.layers],
        base_predictions=_chances(token.base_predictions, texts),
        predictions=_chances(token.predictions, texts),
    )


def _chances(found: Sequence[Probability], texts: Mapping[int, str]) -> list[types_pb2.TokenProbability]:
    return [
        types_pb2.TokenProbability(token_id=p.token_id, token=texts[p.token_id], probability=p.probability)
        for p in found
    ]


def tokens_named(reading: Reading) -> set[int]:
    """Every token id that a reading predicts."""
    found: set[int] = set()
    for token in reading.tokens:
        for rows in (token.base_predictions, token.predictions, *(rows for _, rows in token.layers)):
            found.update(p.token_id for p in rows)
    return found


def intervention(
    message: types_pb2.InterventionSpec, transcoders: Mapping[str, tuple[Transcoder, str]]
) -> Intervention:
    """A change of the forward pass; transcoders are the attached ones by lens id.

    Raises:
        errors.Invalid: it names a transcoder that is not attached.
    """
    named = message.transcoder_id
    if named and named not in transcoders:
        raise errors.Invalid.of("interventions.transcoder_id", "is not attached to the model as a lens of that id")
    return Intervention(
        site=message.site,
        layer=message.layer,
        op=cast(Op, _OPS[message.op]),
        vector=tuple(message.vector),
        transcoder=transcoders[named] if named else None,
        feature=message.feature if message.HasField("feature") else None,
        factor=message.factor if message.HasField("factor") else 1.0,
        positions=tuple(message.positions),
    )


def generated(made: Generation) -> types_pb2.GeneratedText:
    """A continuation, or a part of one."""
    return types_pb2.GeneratedText(text=made.text, token_ids=made.token_ids, seconds=made.seconds)
