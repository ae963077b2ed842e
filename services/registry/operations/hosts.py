"""Host processes: how they announce themselves, how their rows follow what they hold, and how they are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.kit.errors import LensmeshError, NotFound, Unavailable
from services.registry.domain import Host, HostedLens, HostedModel, Model, Residency
from services.registry.operations.duplicating import duplicate
from services.registry.operations.loading import restore
from services.registry.operations.pressure import relieve
from services.registry.operations.registry import Registry
from services.registry.operations.running import adopt, ready_facts, restore_lenses, settle_abandoned
from services.registry.operations.unloading import departed
from services.registry.ports import Transaction


async def register_host(registry: Registry, facts: Mapping[str, Any], held: Sequence[HostedModel]) -> float:
    """Write a host process down, with what it holds already; seconds between its heartbeats.

    Another incarnation than before is a new process: what the former one held is gone, and its reservations with it.
    """
    host_id = facts["host_id"]
    async with registry.store.transaction() as tx:
        former = await tx.placement.register(facts)
        if former is not None and former != facts["incarnation"]:
            await tx.placement.drop_reservations(host_id)
    await follow(registry, host_id, held)
    return registry.limits.heartbeat_seconds


async def heartbeat(
    registry: Registry,
    host_id: str,
    incarnation: str,
    held: Sequence[HostedModel],
    *,
    figures: Mapping[str, Any],
) -> bool:
    """A sign of life, with the figures that were measured; whether the host shall register again.

    A report may be older than the rows, so a difference is not believed: the host is asked what it holds now.
    """
    async with registry.store.transaction() as tx:
        known = await tx.placement.heartbeat(host_id, incarnation, **figures)
    if not known:
        return True
    async with registry.store.transaction() as tx:
        await tx.placement.use(host_id, held)
        rows = await tx.placement.of_host(host_id)
    if _differs(rows, held):
        await reconcile(registry, host_id)
    return False


async def reconcile(registry: Registry, host_id: str) -> None:
    """Ask a host what it holds, and make the rows say so; a host that does not answer is left to its heartbeats."""
    async with registry.store.transaction() as tx:
        host = next((host for host in await tx.placement.hosts() if host.host_id == host_id), None)
    if host is None:
        return
    try:
        incarnation, held = await registry.hosts.state(host.address)
    except Unavailable:
        return
    if incarnation == host.incarnation:
        await follow(registry, host_id, held, known=host.residents)


async def follow(
    registry: Registry, host_id: str, held: Sequence[HostedModel], *, known: Sequence[Residency] | None = None
) -> None:
    """Make the rows of a host say what it holds. Models that load or leave right now are their jobs' business.

    Args:
        registry: the registry.
        host_id: the host.
        held: what it holds, read from it after `known`.
        known: the rows as they were before it was asked; the present ones when nothing can have changed meanwhile.
    """
    async with registry.store.transaction() as tx:
        host = await tx.placement.lock_host(host_id)
    by_id = {model.model_id: model for model in held}
    for row in host.residents if known is None else known:
        hosted = by_id.pop(row.model_id, None)
        if row.moving:
            continue
        if hosted is None or hosted.quantization != row.quantization:
            async with registry.store.transaction() as tx:
                await departed(tx, row, cause="host_lost_it")
        else:
            await _update(registry, host, row, hosted)
    for hosted in by_id.values():
        await _adopt_or_unload(registry, host, hosted)


async def list_devices(registry: Registry) -> list[Host]:
    """Every device that ever announced itself, by name; one that is silent for too long is lost."""
    async with registry.store.transaction() as tx:
        return await tx.placement.all_hosts()


async def lose_silent_hosts(registry: Registry) -> list[str]:
    """Hosts that were not heard for too long are lost: their models are no longer ready; ids of those hosts."""
    async with registry.store.transaction() as tx:
        silent = await tx.placement.silent(registry.limits.host_timeout)
        for host_id in silent:
            await tx.placement.lose(host_id)
    for host_id in silent:
        async with registry.store.transaction() as tx:
            held = await tx.placement.of_host(host_id)
        rows = [row for row in held if row.state in ("resident", "unloading", "parking", "parked")]
        for row in rows:
            await _lose(registry, row)
    return silent


async def start(registry: Registry, preload: Sequence[str]) -> list[str]:
    """Once per start of the registry: what a former one left half done, and what is to be loaded at start.

    Args:
        registry: the registry.
        preload: models, and groups whose base and lenses are wanted, beside those that are marked for it.

    Returns:
        Those of `preload` that do not exist.
    """
    async with registry.store.transaction() as tx:
        await tx.placement.revert_unloads()
        await tx.models.want_preloaded(registry.limits.host_timeout)
    unknown = []
    for name in preload:
        async with registry.store.transaction() as tx:
            try:
                model_id = (await tx.groups.get(name)).model_id if name.startswith("grp_") else name
                model = await tx.models.get(model_id, lock=True)
            except NotFound:
                unknown.append(name)
                continue
            status = "unloaded" if model.status == "failed" else model.status
            await tx.models.update(model_id, wanted=True, status=status)
    return unknown


async def tick(registry: Registry) -> None:
    """Once a second: lose silent hosts, relieve full ones, settle loads, bring wanted models back, copy hot ones."""
    await lose_silent_hosts(registry)
    await relieve(registry)
    await settle_abandoned(registry)
    async with registry.store.transaction() as tx:
        await tx.placement.forget_ended_preloads()
        wanted = await tx.models.to_restore()
        alive = await tx.placement.hosts()
    for model_id in wanted if alive else ():
        await restore(registry, model_id)
    await duplicate(registry)


async def _lose(registry: Registry, row: Residency) -> None:
    """A host took its copy along: the row stays as `lost`, in case the same process comes back with it."""
    async with registry.store.transaction() as tx:
        model = await tx.models.get(row.model_id, lock=True)
        await tx.placement.change(row.model_id, row.host_id, state="lost", leases=0, job_id=None)
        rest = {r.state for r in await tx.placement.of_model(row.model_id)}
        if rest & {"resident", "unloading", "parking"} or model.status != "ready":
            return
        status = "loading" if "loading" in rest else "unloaded"
        await tx.models.update(row.model_id, status=status, memory_usage_bytes=None, progress=0.0, fingerprint=None)
        device = f"{row.host_id}/{row.device}"
        facts = {"model_id": row.model_id, "status": status, "device": device, "cause": "host_lost", "freed_bytes": 0}
        await tx.emit("model:unloaded", row.model_id, facts)


async def _update(registry: Registry, host: Host, row: Residency, hosted: HostedModel) -> None:
    async with registry.store.transaction() as tx:
        model = await tx.models.get(row.model_id, lock=True)
        await adopt(tx, host, hosted)
        copies = await tx.placement.of_model(row.model_id)
        now = {lens.lens_id: lens.state for r in copies if r.host_id == host.host_id for lens in r.lenses}
        known = {lens.lens_id: lens.state for lens in row.lenses}
        moving = {lens.lens_id for lens in row.lenses if lens.moving}
        for lens_id in (known.keys() | hosted.lenses.keys()) - moving:
            if now.get(lens_id) != known.get(lens_id):
                continue  # it has come, left or moved since the host was asked
            if lens_id in hosted.lenses:
                await _place_lens(tx, row.model_id, host, lens_id, hosted.lenses[lens_id])
            else:
                await tx.groups.displace_lens(lens_id, host.host_id)
        if hosted.parked:
            await _not_on_a_device(tx, model)
        elif model.status not in ("ready", "loading"):
            await tx.models.update(row.model_id, status="ready", progress=100.0, memory_usage_bytes=hosted.memory_bytes)
            await tx.emit("model:ready", row.model_id, ready_facts(model, host, hosted))


async def _place_lens(tx: Transaction, model_id: str, host: Host, lens_id: str, held: HostedLens) -> None:
    state = "parked" if held.parked else "here"
    await tx.groups.place_lens(lens_id, model_id, host.host_id, held.memory_bytes, state)


async def _not_on_a_device(tx: Transaction, model: Model) -> None:
    """A copy turned out to be parked: the model is `unloaded` unless another copy serves."""
    rest = {copy.state for copy in await tx.placement.of_model(model.id)}
    if model.status == "ready" and not rest & {"resident", "unloading", "parking"}:
        await tx.models.update(model.id, status="unloaded", memory_usage_bytes=None, progress=0.0, fingerprint=None)


async def _adopt_or_unload(registry: Registry, host: Host, hosted: HostedModel) -> None:
    """A model without a row: a former registry's load that ended unseen. It stays if it is wanted."""
    async with registry.store.transaction() as tx:
        try:
            model = await tx.models.get(hosted.model_id, lock=True)
        except NotFound:
            model = None
        if model is not None:
            if any(copy.host_id == host.host_id for copy in await tx.placement.of_model(model.id)):
                return
            if model.wanted and model.quantization == hosted.quantization and not hosted.parked:
                await adopt(tx, host, hosted)
                for lens_id, lens in hosted.lenses.items():
                    await _place_lens(tx, model.id, host, lens_id, lens)
                ready = {"status": "ready", "progress": 100.0, "memory_usage_bytes": hosted.memory_bytes}
                await tx.models.update(model.id, fingerprint=hosted.fingerprint or None, **ready)
                await tx.emit("model:ready", model.id, ready_facts(model, host, hosted))
    if model is not None and model.wanted and model.quantization == hosted.quantization and not hosted.parked:
        await restore_lenses(registry, model.id, host.host_id)
        return
    try:
        await registry.hosts.unload(host.address, hosted.model_id, 0.0)
    except LensmeshError:
        return  # in use, or gone by now; the next heartbeat tells


def _differs(rows: Sequence[Residency], held: Sequence[HostedModel]) -> bool:
    still = [row for row in rows if row.state in ("resident", "parked") and not row.moving]
    lenses = {r.model_id: {(x.lens_id, x.state == "parked", x.bytes) for x in r.lenses if not x.moving} for r in still}
    expected = {row.model_id: (row.quantization, row.state == "parked", lenses[row.model_id]) for row in still}
    busy = {row.model_id for row in rows if row.moving}
    moving = {lens.lens_id for row in rows for lens in row.lenses if lens.moving}
    settled = {
        m.model_id: {(name, x.parked, x.memory_bytes) for name, x in m.lenses.items() if name not in moving}
        for m in held
    }
    found = {m.model_id: (m.quantization, m.parked, settled[m.model_id]) for m in held if m.model_id not in busy}
    if expected != found or any(row.state == "lost" for row in rows):
        return True
    measured = {m.model_id: m.memory_bytes for m in held}
    return any(measured[row.model_id] != row.charge_bytes for row in still)
