"""Bytes for jobs beside models: promised in the ledger, once what is idle has made room as it does for a load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from services.kit.errors import Conflict, LensmeshError, Unsupported
from services.registry.domain import Host, Placement
from services.registry.failures import insufficient_memory
from services.registry.operations.estimating import hear_of_leases
from services.registry.operations.leaving import leave, mark
from services.registry.operations.planning import place
from services.registry.operations.registry import Registry
from services.registry.ports import Transaction

NO_LIMIT = 1 << 30
"""Of models: a reservation is none."""


@dataclass(frozen=True, slots=True)
class _Reservation:
    """What room is made for, see `leaving.Taker`."""

    id: str
    holder_id: str
    size: int
    """Bytes, on each device."""

    async def gain(self, tx: Transaction, host_id: str, size: int) -> None:
        await tx.placement.gain(host_id, self.id, size, self.size)

    async def withdraw(self, tx: Transaction) -> None:
        await tx.placement.release(self.holder_id, self.id)


async def reserve(
    registry: Registry, host_id: str, owner: str, size: int, *, ranks: int, uses: Sequence[str]
) -> list[str]:
    """Promise bytes to a job, for each of its ranks, in place of what it had; never more than a ledger has.

    Idle models and lenses leave for it, parked where there is room, by the rules of a load's plan; none comes back
    by itself.

    Args:
        registry: the registry.
        host_id: who asks.
        owner: the job.
        size: bytes of each rank.
        ranks: processes of the job.
        uses: models that the job works with, which stay.

    Returns:
        The device of each rank, this host's first: `cpu`, or how CUDA_VISIBLE_DEVICES names a GPU. On a CPU all bytes
        are this process's where it has them, else those of as many processes of its machine, each of which then makes
        room of its own.

    Raises:
        NotFound: no such host.
        Unavailable: `NO_HOST`: it is lost.
        Conflict: `IN_USE`: a model is there that wants the device alone and may not leave; the former reservation
            stays.
        Exhausted: `INSUFFICIENT_MEMORY`; the former reservation stays.
        Unsupported: its machine has fewer GPUs in the mesh than ranks; the former reservation stays.
    """
    await hear_of_leases(registry)
    placed = partial(place, limit=NO_LIMIT, settled=registry.limits.minimum_residency, stays=uses)
    while True:
        async with registry.store.transaction() as tx:
            await tx.placement.release(host_id, owner)
            live = await tx.placement.hosts(lock=True) if ranks > 1 else []
            first = await tx.placement.lock_host(host_id)
            hosts = _gang(first, live, ranks, size, placed)
            each = size * ranks // len(hosts)
            members = []
            for host in hosts:
                now = await tx.placement.lock_host(host.host_id)  # with what those before it have taken of one ledger
                alone = len(hosts) > 1 and not now.accelerator
                member = placed(each, replace(now, siblings=()) if alone else now)
                if not member.fits:
                    raise _refusal(member)
                promised = max(0, each - member.own_freed_bytes)
                await tx.placement.reserve(now.host_id, owner, promised, holder_id=host_id)
                await mark(tx, member.evictions)
                members.append(member)
        if await leave(registry, members, _Reservation(owner, host_id, each)):
            return [host.accelerator or "cpu" for host in hosts] * (ranks // len(hosts))


async def release(registry: Registry, host_id: str, owner: str) -> None:
    """Give back what a host has reserved for an owner; nothing happens when there is nothing."""
    async with registry.store.transaction() as tx:
        await tx.placement.release(host_id, owner)


def _refusal(member: Placement) -> LensmeshError:
    device = member.device
    if not member.taken_by or member.required_bytes > member.host.budget_bytes:
        return insufficient_memory(member.required_bytes, member.obtainable_bytes, device)
    return Conflict(
        f"{device} is not to be shared, and {member.taken_by} may not leave",
        reason="IN_USE",
        metadata={"model_id": member.taken_by, "device": device},
        retry_after=5.0,
    )


def _gang(
    first: Host, live: Sequence[Host], ranks: int, size: int, placed: Callable[[int, Host], Placement]
) -> list[Host]:
    """That host and the best others of its machine, one per GPU: those with room, as they are, and with most of it.

    On a CPU it alone if it has room for all; else, before models leave, together with others.
    """
    if ranks == 1:
        return [first]
    machine = first.address.rpartition(":")[0]
    near = [host for host in live if host.address.rpartition(":")[0] == machine and host.host_id != first.host_id]
    if not first.accelerator:
        others = sorted((host for host in near if not host.accelerator), key=lambda host: -host.free_bytes)
        together, spread = placed(size * ranks, first), [first, *others[: ranks - 1]]
        if len(spread) < ranks or (together.fits and not together.evictions):
            return [first]
        free = size * ranks <= first.device_free_bytes and all(size <= host.free_bytes for host in spread)
        return spread if free or not together.fits else [first]

    def preference(host: Host) -> tuple[bool, int, int]:
        placement = placed(size, host)
        return not placement.fits, len(placement.evictions), -placement.available_bytes

    gpus = {host.accelerator: host for host in sorted(near, key=preference, reverse=True)}
    found = [host for name, host in gpus.items() if name not in ("", first.accelerator)]
    if len(found) < ranks - 1:
        facts = {"devices": ranks, "available": 1 + len(found)}
        raise Unsupported(f"{machine} has {1 + len(found)} GPUs in the mesh", metadata=facts)
    return [first, *sorted(found, key=preference)[: ranks - 1]]
