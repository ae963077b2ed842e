"""Taking models off devices: on request, for another model's sake, or to clear a device."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from services.kit.errors import Conflict, Exhausted, LensmeshError, NotFound
from services.registry.domain import Model, Residency
from services.registry.operations.planning import may_leave
from services.registry.operations.registry import Registry
from services.registry.ports import Transaction


async def unload_model(registry: Registry, model_id: str, wait_seconds: float) -> Model:
    """Take a model off every device, or take back that it is to be loaded; answers when the memory is back.

    Raises:
        Conflict: it is loading or was never loaded; `IN_USE` when leases are held after the wait.
    """
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id, lock=True)
        copies = await tx.placement.of_model(model_id)
        waits = model.status == "unloaded" or (model.status == "pending" and model.wanted)
        if not copies and not waits:
            raise Conflict(
                f"Model {model_id} is {model.status}, not on a device",
                metadata={"model_id": model_id, "status": model.status},
            )
        if not copies:  # else it is wanted until the last one has left: an unload may be refused
            await tx.models.update(model_id, wanted=False)
    await unload_copies(registry, model_id, wait_seconds=wait_seconds, cause="user")
    async with registry.store.transaction() as tx:
        return await tx.models.get(model_id)


async def unload_copies(
    registry: Registry, model_id: str, *, wait_seconds: float, cause: str, only: tuple[str, ...] = ()
) -> int:
    """Take a model's copies off their hosts, those of `only` when given; bytes that came back.

    Raises:
        Conflict: `ALREADY_LOADING`; `IN_USE` when leases are held after the wait: that copy stays.
    """
    async with registry.store.transaction() as tx:
        await tx.models.get(model_id, lock=True)
        copies = [r for r in await tx.placement.of_model(model_id) if not only or r.host_id in only]
        loading = next((r for r in copies if r.state == "loading"), None)
        if loading is not None:
            raise Conflict(
                f"Model {model_id} is loading; cancel job {loading.job_id} instead",
                reason="ALREADY_LOADING",
                metadata={"model_id": model_id, "task_id": loading.job_id or ""},
            )
        for copy in copies:
            if copy.state == "resident":
                await tx.placement.change(model_id, copy.host_id, state="unloading")
    freed = 0
    for position, copy in enumerate(copies):
        try:
            if copy.state != "lost":
                await take_off(registry, copy, wait_seconds)
        except LensmeshError:
            await _keep(registry, copies[position:])
            raise
        async with registry.store.transaction() as tx:
            await departed(tx, copy, cause=cause, wanted=False)
        freed += copy.bytes
    return freed


async def _keep(registry: Registry, copies: list[Residency]) -> None:
    async with registry.store.transaction() as tx:
        for copy in copies:
            if copy.state == "resident":
                await tx.placement.change(copy.model_id, copy.host_id, state="resident")


async def take_off(registry: Registry, copy: Residency, wait_seconds: float) -> None:
    """Ask the host; one that has it no longer is as good.

    Raises:
        Conflict: `IN_USE`.
    """
    try:
        await registry.hosts.unload(copy.address, copy.model_id, wait_seconds)
    except NotFound:
        return


async def send_away(registry: Registry, copy: Residency, *, parks: bool) -> bool:
    """Take a copy off its device at once, to host memory where it `parks` and there is room; whether it is parked.

    Raises:
        Conflict: `IN_USE`.
    """
    if parks:
        with suppress(Exhausted):
            await registry.hosts.park(copy.address, copy.model_id)
            return True
    await take_off(registry, copy, 0.0)
    return False


async def departed(
    tx: Transaction,
    copy: Residency,
    *,
    cause: str,
    wanted: bool | None = None,
    evicted: bool = False,
    parked: bool = False,
) -> None:
    """A copy is off its device: rows and events say so. The model is `unloaded` when it was the last one.

    Args:
        tx: the transaction; the model is locked in it.
        copy: what left.
        cause: why, for the event.
        wanted: whether it should still be on a device; unchanged when None, and while another copy is or comes.
        evicted: whether it made room for something.
        parked: whether it stays in host memory.
    """
    model = await tx.models.get(copy.model_id, lock=True)
    if parked:
        stays = {"state": "parked", "job_id": None, "cause": None, "active_lens_id": None}
        await tx.placement.change(copy.model_id, copy.host_id, **stays)
    elif not await tx.placement.remove(copy.model_id, copy.host_id) and not evicted:
        return
    rest = {r.state for r in await tx.placement.of_model(copy.model_id)}
    status = model.status
    if copy.state != "parked" and not rest & {"resident", "unloading", "parking"}:
        status = "loading" if "loading" in rest else "unloaded"
    changes: dict[str, object] = {"status": status, "last_used_at": model.last_used_at}
    if status != "ready":
        changes |= {"memory_usage_bytes": None, "progress": 0.0, "fingerprint": None}
    if wanted is not None and not rest & {"loading", "resident"}:
        changes["wanted"] = wanted
    await tx.models.update(copy.model_id, **changes)
    facts = {
        "model_id": copy.model_id,
        "status": status,
        "device": f"{copy.host_id}/{copy.device}",
        "freed_bytes": copy.bytes,
        "cause": cause,
        "parked": parked,
    }
    if evicted or cause in ("device_cleared", "out_of_memory"):
        await tx.emit("model:evicted", copy.model_id, facts)
    if status == "unloaded" and copy.state != "parked":
        await tx.emit("model:unloaded", copy.model_id, facts)


async def clear_processes(registry: Registry, host_id: str, keep: Collection[str] = ()) -> None:
    """Clear a device that has run out of memory in all its processes; models of `keep` stay in that of `host_id`.

    Raises:
        NotFound: the host is not live.
    """
    async with registry.store.transaction() as tx:
        siblings = next((host.siblings for host in await tx.placement.hosts() if host.host_id == host_id), ())
    await clear_device(registry, host_id, cause="out_of_memory", keep=keep)
    for process in siblings:
        await clear_device(registry, process.host_id, cause="out_of_memory")


async def clear_device(
    registry: Registry, device: str, cause: str = "device_cleared", keep: Collection[str] = ()
) -> tuple[list[str], int]:
    """Unload what is idle and not pinned on a device, and empty its allocator's cache; who left, and the bytes.

    Models of `keep` stay.

    Raises:
        NotFound: no live host has it.
    """
    async with registry.store.transaction() as tx:
        host = next((h for h in await tx.placement.hosts() if device in (h.name, h.host_id)), None)
    if host is None:
        raise NotFound(f"There is no live device {device}", metadata={"device": device})
    left: list[str] = []
    freed = 0
    for copy in [r for r in host.residents if may_leave(r) and r.model_id not in keep]:
        try:
            freed += await unload_copies(registry, copy.model_id, wait_seconds=0.0, cause=cause, only=(host.host_id,))
        except Conflict:  # it came into use meanwhile
            continue
        registry.gauges.evicted(cause)
        left.append(copy.model_id)
    return left, freed + await registry.hosts.empty_cache(host.address)
