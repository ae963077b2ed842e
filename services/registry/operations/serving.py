"""Calls that are forwarded once to the host that has the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.kit.errors import Conflict, Invalid
from services.registry.domain import LensArtifact, Residency
from services.registry.operations.lenses import bring
from services.registry.operations.registry import Registry
from services.registry.operations.turns import serving

DEFAULT_SAMPLES = 64
DEFAULT_NEW_TOKENS = 64


async def locate(registry: Registry, model_id: str) -> Residency:
    """The copy of a model that serves.

    Raises:
        NotFound: `MODEL_NOT_FOUND`.
        Conflict: it is nowhere.
    """
    async with registry.store.transaction() as tx:
        copy = await serving(tx, model_id)
        if copy is not None:
            await tx.placement.touch(copy.model_id, copy.host_id)
            return copy
        model = await tx.models.get(model_id)
    raise Conflict(
        f"Model {model_id} is {model.status}, not on a device; load it first",
        metadata={"model_id": model_id, "status": model.status},
    )


async def measure_perplexity(
    registry: Registry, model_id: str, dataset_id: str, sample_count: int, max_length: int
) -> dict[str, Any]:
    """Perplexity of a loaded model on a dataset, kept in its record with what its quantization costs.

    Raises:
        NotFound: no such model or dataset.
        Conflict: the model is nowhere.
    """
    async with registry.store.transaction() as tx:
        await tx.datasets.get(dataset_id)
    copy = await locate(registry, model_id)
    asked = (model_id, dataset_id, sample_count or DEFAULT_SAMPLES, max_length)
    result = await registry.hosts.measure_perplexity(copy.address, *asked)
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id)
        unquantized = await tx.models.unquantized_perplexity(model.digest or "", dataset_id, result["tokens"])
        result = {**result, "dataset_id": dataset_id, "over_unquantized": None}
        if unquantized is not None and result["quantization"] != "none":
            result["over_unquantized"] = result["perplexity"] / unquantized - 1
        await tx.models.append_perplexity(model_id, result)
    return result


async def generate(registry: Registry, model_id: str, query: dict[str, Any], extension_id: str) -> Any:
    """Continue a prompt with a loaded model, with an extension when one is named; the host's answer.

    Raises:
        NotFound: no such model or extension.
        Invalid: an intervention names a transcoder that is no lens of the model's groups.
        Conflict: the model is nowhere; `LENS_INCOMPATIBLE`: the extension is of another base.
    """
    async with registry.store.transaction() as tx:
        copies = await tx.placement.of_model(model_id)
    with registry.spread.over(registry, copies) as chosen:
        copy = chosen or await locate(registry, model_id)
        if chosen is not None:
            async with registry.store.transaction() as tx:
                await tx.placement.touch(copy.model_id, copy.host_id)
        extension = await _extension(registry, model_id, extension_id) if extension_id else None
        changes = await with_lenses(registry, copy, query["interventions"])
        query = {**query, "max_new_tokens": query["max_new_tokens"] or DEFAULT_NEW_TOKENS, "interventions": changes}
        return await registry.hosts.generate(copy.address, model_id, query, extension)


async def _extension(registry: Registry, model_id: str, extension_id: str) -> tuple[str, LensArtifact]:
    artifact = await registry.peers.extension(extension_id)
    if artifact.model_id != model_id:
        raise Conflict(
            f"Extension {extension_id} belongs to model {artifact.model_id}",
            reason="LENS_INCOMPATIBLE",
            metadata={"extension_model_id": artifact.model_id, "model_id": model_id},
        )
    return extension_id, artifact


async def with_lenses(
    registry: Registry, copy: Residency, interventions: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Interventions as the host wants them: a transcoder is named by its lens, which is brought to the device.

    Raises:
        Invalid: one names a transcoder that is no lens of the model's groups.
    """
    if not any(change["transcoder_id"] for change in interventions):
        return list(interventions)
    async with registry.store.transaction() as tx:
        groups = await tx.groups.of_model(copy.model_id)
    lenses = {lens.transcoder_id: lens for group in groups for lens in group.lenses if lens.transcoder_id}
    named = []
    for change in interventions:
        transcoder_id = change["transcoder_id"]
        if transcoder_id and transcoder_id not in lenses:
            raise Invalid.of("interventions.transcoder_id", f"{transcoder_id} is no lens of a group of this model")
        if transcoder_id and lenses[transcoder_id].id not in copy.lens_ids:
            await bring(registry, lenses[transcoder_id], copy)
        named.append({**change, "transcoder_id": lenses[transcoder_id].id if transcoder_id else ""})
    return named
