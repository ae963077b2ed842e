"""What a model's files hold and what a load of it needs, asked from a host and corrected by what was measured."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from services.kit.errors import Invalid, Unavailable
from services.registry.domain import ALONE, Beside, Facts, LoadPlan, Model, Need, Source
from services.registry.operations.planning import ASSUMED_BYTES_PER_SECOND, plan_load
from services.registry.operations.registry import Registry, no_host
from services.registry.ports import Transaction


async def inspect(registry: Registry, source: Source, model_type: str) -> Facts:
    """What the files hold.

    Raises:
        Invalid: the config's model type is another than `model_type`, or the host finds the source wrong.
        Unavailable: no host, or the hub does not answer.
    """
    facts = await registry.ask_a_host(lambda address: registry.hosts.inspect(address, source))
    if model_type and model_type != facts.model_type:
        raise Invalid.of(
            "model_type", f"the model's config says {facts.model_type}", config_model_type=facts.model_type
        )
    return facts


async def inspect_if_reachable(registry: Registry, source: Source, model_type: str) -> Facts | None:
    """The same; None when the source is the hub, which may be asked later."""
    try:
        return await inspect(registry, source, model_type)
    except Unavailable:
        if source.source != "huggingface":
            raise
        return None


def columns_of(facts: Facts) -> dict[str, Any]:
    """The columns of a model's row that its files decide."""
    return {
        "model_type": facts.model_type,
        "architecture": facts.architecture or None,
        "config": facts.config,
        "parameter_count": facts.parameter_count,
        "hidden_size": facts.hidden_size,
        "num_layers": facts.num_layers,
        "vocab_size": facts.vocab_size,
        "context_length": facts.context_length,
        "file_bytes": facts.file_bytes,
        "digest": facts.digest or None,
        "defaults": facts.defaults,
    }


async def inspected(registry: Registry, model_id: str) -> Model:
    """The model with its sizes, which are read now when they could not be read at creation.

    Raises:
        Unavailable: the hub still does not answer.
    """
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id)
    if model.inspected:
        return model
    facts = await inspect(registry, model.files, model.model_type)
    async with registry.store.transaction() as tx:
        return await tx.models.update(model_id, **columns_of(facts))


async def need_of(registry: Registry, source: Source, quantization: str, *, model_id: str = "") -> tuple[Need, float]:
    """Bytes and seconds that a load is expected to take; what was in use at the last heartbeat is asked for again."""
    await hear_of_leases(registry)
    need = await registry.ask_a_host(lambda address: registry.hosts.estimate(address, source, quantization))
    async with registry.store.transaction() as tx:
        measured, seconds = await tx.models.measured(model_id, quantization)
        speed = await tx.models.load_speed()
    need = need.corrected(measured)
    return need, seconds or (need.weights + need.quantization_state) / float(speed or ASSUMED_BYTES_PER_SECOND)


async def expected(registry: Registry, model_id: str, quantization: str) -> dict[str, Any]:
    """The columns that say what a load of a model is expected to take; None in them while nobody can tell.

    Raises:
        NotFound: no such model.
    """
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id)
    found: tuple[Need | None, float | None] = (None, None)
    if model.inspected:
        with suppress(Unavailable):
            found = await need_of(registry, model.files, quantization, model_id=model_id)
    need, seconds = found
    return {"estimated_memory_bytes": need and need.total, "estimated_load_seconds": seconds}


async def hear_of_leases(registry: Registry) -> None:
    """A lease of a moment may have been caught by a heartbeat; it shall not keep a model for the next 5 s."""
    async with registry.store.transaction() as tx:
        hosts = await tx.placement.hosts()
    for host in hosts:
        if any(r.leases or any(lens.leases for lens in r.lenses) for r in host.residents):
            with suppress(Unavailable):
                incarnation, held = await registry.hosts.state(host.address)
                if incarnation == host.incarnation:
                    async with registry.store.transaction() as tx:
                        await tx.placement.use(host.host_id, held)


async def estimate_model(
    registry: Registry,
    model_id: str,
    quantization: str | None,
    device: str,
    beside: Beside = ALONE,
) -> LoadPlan:
    """What a load would need, where it fits and what would be evicted. Changes nothing.

    Raises:
        NotFound: no such model.
        Unavailable: `NO_HOST`.
    """
    model = await inspected(registry, model_id)
    need, seconds = await need_of(registry, model.files, quantization or model.quantization, model_id=model_id)
    copy_of = (model_id, quantization or model.quantization)
    return await plan(registry, need, device=device, seconds=seconds, copy_of=copy_of, beside=beside)


async def plan(
    registry: Registry,
    need: Need,
    *,
    device: str,
    seconds: float,
    fall_back: bool = False,
    copy_of: tuple[str, str] = ("", ""),
    beside: Beside = ALONE,
) -> LoadPlan:
    """Placements of a need over the live hosts; see `plan_load`.

    Raises:
        Unavailable: `NO_HOST`: none has this device.
    """
    async with registry.store.transaction() as tx:
        hosts = await tx.placement.hosts()
        beside = await on_its_terms(tx, copy_of[0], beside)
    if not any(host.answers_to(device) for host in hosts):
        raise no_host(device)
    limit = registry.limits.max_resident_models
    return plan_load(
        need,
        hosts,
        device=device,
        fall_back=fall_back,
        limit=limit,
        seconds=seconds,
        copy_of=copy_of,
        beside=beside,
        settled=registry.limits.minimum_residency,
    )


async def on_its_terms(tx: Transaction, model_id: str, beside: Beside) -> Beside:
    """What a load needs beside the model; everything else leaves where a group of the model wants a device alone."""
    return replace(beside, alone=True) if await tx.groups.exclusive(model_id) else beside
