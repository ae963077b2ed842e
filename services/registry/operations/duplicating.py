"""Copies of what is hot, on devices that nobody uses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from services.kit.errors import Exhausted
from services.registry.domain import Beside, Host, Residency
from services.registry.operations.loading import load_on
from services.registry.operations.registry import Registry


def hot(hosts: Sequence[Host], leases: int) -> list[tuple[Residency, Host]]:
    """Models whose every copy has so many forwards, each with an idle device of the same kind that has no copy."""
    found = []
    taken: set[str] = set()
    copies: dict[str, list[Residency]] = {}
    for copy in (copy for host in hosts for copy in host.residents if copy.state not in ("parked", "lost")):
        copies.setdefault(copy.model_id, []).append(copy)
    devices = {host.host_id: host for host in hosts}
    for _, each in sorted(copies.items()):
        if any(copy.state != "resident" or copy.leases < leases for copy in each):
            continue
        kind = devices[each[0].host_id].device == "cpu"
        idle = (h for h in hosts if _idle(h) and (h.device == "cpu") == kind and h.host_id not in taken)
        free = next((h for h in idle if all(copy.host_id != h.host_id for copy in each)), None)
        if free is not None:
            taken.add(free.host_id)
            found.append((each[0], free))
    return found


def _idle(host: Host) -> bool:
    """Whether nobody uses the device, in whatever process."""
    reserved = any(process.reserved_bytes for process in (host, *host.siblings))
    return not reserved and not any(copy.leases or copy.moving for copy in host.shared_residents)


async def duplicate(registry: Registry) -> None:
    """Load hot models on idle devices, with the lenses that they have; nothing leaves for them."""
    if not registry.limits.duplicate_at:
        return
    async with registry.store.transaction() as tx:
        hosts = await tx.placement.hosts()
    for copy, host in hot(hosts, registry.limits.duplicate_at):
        lenses = tuple((lens.lens_id, lens.bytes) for lens in copy.lenses if lens.state == "here")
        with suppress(Exhausted):  # no room there
            await load_on(registry, host.host_id, copy.model_id, Beside(lenses=lenses, spares="all"))
