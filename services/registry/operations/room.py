"""Room on a device for a lens: what leaves for it, and the ledger while it does."""

from __future__ import annotations

from services.kit.errors import Conflict, NotFound
from services.registry.domain import Eviction, Host, Lens, LensArtifact, LoadPlan, Need, Placement, Residency
from services.registry.failures import insufficient_memory
from services.registry.operations.planning import place_lens
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import departed, park, take_off
from services.registry.ports import Transaction


async def charge(registry: Registry, lens_id: str, artifact: LensArtifact, copy: Residency, *, evict: bool) -> None:
    """Charge the ledger for a lens that comes to a copy of its base, once what the plan names has left.

    Args:
        registry: the registry.
        lens_id: its id.
        artifact: it.
        copy: where it goes.
        evict: whether anything may leave for it.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`; nothing changed.
    """
    while True:
        async with registry.store.transaction() as tx:
            host = await tx.placement.lock_host(copy.host_id)
            if any(lens.lens_id == lens_id and lens.state == "leaving" for r in host.residents for lens in r.lenses):
                placement = None
            else:
                placement = await _charged(tx, lens_id, artifact, copy, host, evict=evict)
        if placement is None:  # it is gone in a moment, and its bytes are promised to another
            await registry.endings.wait(lens_id, 0.2)
        elif await _leave(registry, placement, lens_id):
            return


async def _charged(
    tx: Transaction, lens_id: str, artifact: LensArtifact, copy: Residency, host: Host, *, evict: bool
) -> Placement:
    size = artifact.size_bytes
    placement = place_lens(size, host, {copy.model_id, artifact.activation_source_model_id}, lens_id)
    if not placement.fits or (placement.evictions and not evict):
        room = placement.obtainable_bytes if evict else placement.available_bytes
        raise insufficient_memory(size, room, host.name)
    freed = sum(each.bytes for each in placement.evictions if each.cause != "park_limit")
    here = any(lens.lens_id == lens_id and lens.state == "here" for r in host.residents for lens in r.lenses)
    state = "here" if here else "coming"  # one with other files than before serves until they are there
    await tx.groups.place_lens(lens_id, copy.model_id, copy.host_id, max(0, size - freed), state)
    await _mark(tx, placement)
    return placement


async def plan(registry: Registry, lens: Lens, copy: Residency) -> LoadPlan:
    """What `charge` would evict for a lens that is not on the device. Changes nothing."""
    async with registry.store.transaction() as tx:
        host = next(host for host in await tx.placement.hosts() if host.host_id == copy.host_id)
    keep = {copy.model_id, lens.activation_source_model_id or ""}
    placement = place_lens(lens.size_bytes, host, keep, lens.id)
    return LoadPlan(Need(lens.size_bytes, 0, 0, 0), (placement,), 0.0)


async def make_all_room(registry: Registry, lens_id: str, artifact: LensArtifact, copy: Residency) -> None:
    """Evict everything idle that a lens can do without: the device is out of memory, whatever the ledger says."""
    async with registry.store.transaction() as tx:
        host = await tx.placement.lock_host(copy.host_id)
        keep = {copy.model_id, artifact.activation_source_model_id}
        most = place_lens(1 << 62, host, keep, lens_id).obtainable_bytes
        placement = place_lens(most, host, keep, lens_id)
        await _mark(tx, placement)
    await _leave(registry, placement, lens_id)


async def evict_lens(registry: Registry, copy: Residency, lens_id: str) -> bool:
    """Ask the host to take a lens off; false when it is in use there."""
    try:
        await registry.hosts.detach_lens(copy.address, copy.model_id, lens_id)
    except NotFound:
        return True
    except Conflict as error:
        return error.reason != "IN_USE"  # else its base is not there any more
    return True


async def lens_departed(tx: Transaction, copy: Residency, lens_id: str, size: int, cause: str) -> None:
    """A lens is off its device alone: rows and the event say so."""
    await tx.groups.displace_lens(lens_id, copy.host_id)
    facts = {
        "lens_id": lens_id,
        "model_id": copy.model_id,
        "device": f"{copy.host_id}/{copy.device}",
        "freed_bytes": size,
        "cause": cause,
    }
    await tx.emit("lens:evicted", lens_id, facts)


async def _mark(tx: Transaction, placement: Placement) -> None:
    """Nobody else plans with what is about to leave."""
    host_id = placement.host.host_id
    await tx.placement.lenses_leave(host_id, [each.lens_id for each in placement.evictions if each.lens_id], None)
    for each in placement.evictions:
        if not each.lens_id and each.cause != "park_limit":
            state = "parking" if each.parked else "unloading"
            await tx.placement.change(each.model_id, host_id, state=state, job_id=None)


async def _leave(registry: Registry, placement: Placement, lens_id: str) -> bool:
    """What the placement names leaves, parked models first; false when something came into use, and all is undone."""
    host = placement.host
    copies = {copy.model_id: copy for copy in host.residents}
    order = sorted(placement.evictions, key=lambda each: each.cause != "park_limit")
    for position, each in enumerate(order):
        copy = copies[each.model_id]
        gone = await (_lens_leaves if each.lens_id else _model_leaves)(registry, copy, each, lens_id, placement)
        if not gone:
            async with registry.store.transaction() as tx:
                await tx.groups.displace_lens(lens_id, host.host_id)
                for other in order[position:]:
                    await _stay(tx, host, other, busy=other is each)
            return False
        registry.gauges.evicted(each.cause)
    return True


async def _lens_leaves(registry: Registry, copy: Residency, each: Eviction, lens_id: str, of: Placement) -> bool:
    if not await evict_lens(registry, copy, each.lens_id):
        return False
    async with registry.store.transaction() as tx:
        await lens_departed(tx, copy, each.lens_id, each.bytes, each.cause)
        await tx.groups.charge_lens(lens_id, copy.host_id, each.bytes, of.required_bytes)
    registry.endings.ended(each.lens_id)
    return True


async def _model_leaves(registry: Registry, copy: Residency, each: Eviction, lens_id: str, of: Placement) -> bool:
    try:
        parked = each.parked and await park(registry, copy)
        if not parked:
            await take_off(registry, copy, 0.0)
    except Conflict:
        return False
    async with registry.store.transaction() as tx:
        await departed(tx, copy, cause=each.cause, wanted=False, evicted_for=lens_id, parked=parked)
        if each.cause != "park_limit":
            await tx.groups.charge_lens(lens_id, copy.host_id, each.bytes, of.required_bytes)
    return True


async def _stay(tx: Transaction, host: Host, each: Eviction, *, busy: bool) -> None:
    """It does not leave after all."""
    if each.lens_id:
        await tx.placement.lens_stays(host.host_id, each.lens_id, 1 if busy else None)
    elif each.cause != "park_limit":
        more = {"leases": 1} if busy else {}
        await tx.placement.change(each.model_id, host.host_id, state="resident", **more)
