"""Devices that are nearly full, whoever fills them: idle models leave before something dies of it."""

from __future__ import annotations

from services.kit.errors import Conflict, LensmeshError
from services.registry.domain import Host, Residency
from services.registry.operations.planning import idle_on_device, in_order_of_leaving
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import departed, send_away

CAUSE = "pressure"


async def relieve(registry: Registry) -> list[str]:
    """Of every device over `PRESSURE`, park the model that was idle longest; who left.

    One for each measurement, so that the next one shows whether it was enough. Where parking frees nothing (the CPU, an
    integrated GPU, host memory that is full) the model is unloaded.
    """
    async with registry.store.transaction() as tx:
        pressed = [host for host in await tx.placement.hosts() if host.pressed]
    left = []
    for host in pressed:
        if registry.relieved.get(host.host_id) == host.heartbeat_at:
            continue
        if any(other.pressed and other.host_id < host.host_id for other in host.siblings):
            continue  # they measure the same device
        registry.relieved[host.host_id] = host.heartbeat_at
        oldest = next(iter(idle_on_device(host)), None)
        if oldest is not None:
            process = next(each for each in (host, *host.siblings) if each.host_id == oldest.host_id)
            if await _leave(registry, process, oldest):
                left.append(oldest.model_id)
    return left


async def _leave(registry: Registry, host: Host, copy: Residency) -> bool:
    parks = host.device != "cpu" and copy.bytes <= host.park_bytes - host.parked_bytes
    async with registry.store.transaction() as tx:
        now = {r.model_id: r for r in (await tx.placement.lock_host(host.host_id)).residents}
        if copy.model_id not in {r.model_id for r in in_order_of_leaving(list(now.values()), ())}:
            return False  # it came into use meanwhile
        await tx.placement.change(copy.model_id, host.host_id, state="parking" if parks else "unloading", job_id=None)
    try:
        parked = await send_away(registry, copy, parks=parks)
    except LensmeshError as error:
        more = {"leases": 1} if isinstance(error, Conflict) else {}
        async with registry.store.transaction() as tx:
            await tx.placement.change(copy.model_id, host.host_id, state="resident", **more)
        return False
    async with registry.store.transaction() as tx:
        await departed(tx, copy, cause=CAUSE, wanted=False, evicted=True, parked=parked)
    registry.gauges.evicted(CAUSE)
    return True
