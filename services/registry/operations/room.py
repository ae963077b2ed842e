"""Room on a device for a lens: what leaves for it, and the ledger while it does."""

from __future__ import annotations

from dataclasses import dataclass

from services.registry.domain import HeldLens, Host, Lens, LensArtifact, LoadPlan, Need, Placement, Residency
from services.registry.failures import insufficient_memory
from services.registry.operations.leaving import Taker, leave, mark
from services.registry.operations.planning import place_lens
from services.registry.operations.registry import Registry
from services.registry.ports import Transaction


@dataclass(frozen=True, slots=True)
class _Coming:
    """A lens that comes to a host: what is made room for, see `leaving.Taker`."""

    id: str
    copy: Residency
    """The copy of its base that it comes to."""
    size: int
    stowed: HeldLens | None = None
    """It where it is parked, and stays when it does not come."""

    async def gain(self, tx: Transaction, host_id: str, size: int) -> None:
        if host_id == self.copy.host_id:
            await tx.groups.charge_lens(self.id, host_id, size, self.size)

    async def withdraw(self, tx: Transaction) -> None:
        model_id, host_id = self.copy.model_id, self.copy.host_id
        if self.stowed is None:
            await tx.groups.displace_lens(self.id, host_id)
        else:
            await tx.groups.place_lens(self.id, model_id, host_id, self.stowed.bytes, "parked")


async def charge(registry: Registry, lens_id: str, artifact: LensArtifact, copy: Residency, *, evict: bool) -> Taker:
    """Charge the ledger for a lens that comes to a copy of its base, once what the plan names has left.

    Args:
        registry: the registry.
        lens_id: its id.
        artifact: it.
        copy: where it goes.
        evict: whether anything may leave for it.

    Returns:
        It as it comes, which is withdrawn if it does not.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`; nothing changed.
    """
    while True:
        async with registry.store.transaction() as tx:
            host = await tx.placement.lock_host(copy.host_id)
            there = next((lens for r in host.residents for lens in r.lenses if lens.lens_id == lens_id), None)
            leaves = there is not None and there.moving and there.state != "coming"
            here = there is not None and there.state == "here"
            placement = None if leaves else await _charged(tx, lens_id, artifact, copy, host, here=here, evict=evict)
        if placement is None:  # it is gone in a moment, and its bytes are promised to another
            await registry.endings.wait(lens_id, 0.2)
            continue
        coming = _Coming(lens_id, copy, placement.required_bytes, there if there and there.stowed else None)
        if await leave(registry, [placement], coming):
            return coming


async def _charged(
    tx: Transaction, lens_id: str, artifact: LensArtifact, copy: Residency, host: Host, *, here: bool, evict: bool
) -> Placement:
    size = artifact.size_bytes
    placement = place_lens(size, host, {copy.model_id, artifact.activation_source_model_id}, lens_id)
    if not placement.fits or (placement.evictions and not evict):
        room = placement.obtainable_bytes if evict else placement.available_bytes
        raise insufficient_memory(size, room, host.name)
    state = "here" if here else "coming"  # one with other files than before serves until they are there
    await tx.groups.place_lens(lens_id, copy.model_id, copy.host_id, max(0, size - placement.own_freed_bytes), state)
    await mark(tx, placement.evictions)
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
        await mark(tx, placement.evictions)
    await leave(registry, [placement], _Coming(lens_id, copy, placement.required_bytes))
