"""What leaves devices to make room: marked first, so that nobody else plans with it, then taken off."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from services.kit.errors import Conflict, Exhausted, LensmeshError, NotFound, Unsupported
from services.kit.waiting import to_the_end
from services.registry.domain import Eviction, Placement, Residency
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import departed, send_away
from services.registry.ports import Transaction


class Taker(Protocol):
    """What room is made for, if it is no load."""

    @property
    def id(self) -> str:
        """Its name in events."""

    async def gain(self, tx: Transaction, host_id: str, size: int) -> None:
        """So many bytes of a host are free; those that it is to have are promised to it in the same transaction."""

    async def withdraw(self, tx: Transaction) -> None:
        """It does not come: nothing is promised to it any more."""


async def evict_lens(registry: Registry, copy: Residency, lens_id: str, *, park: bool) -> bool:
    """Ask the host to take a lens off, into its memory if it has room there and may; whether it is parked.

    Raises:
        Conflict: `IN_USE`.
    """
    detach = partial(registry.hosts.detach_lens, copy.address, copy.model_id, lens_id)
    try:
        if park:
            with suppress(Exhausted, Unsupported):
                await detach(park=True)
                return True
        await detach()
    except NotFound:
        return False
    except Conflict as error:
        if error.reason == "IN_USE":
            raise
    return False  # its base may be gone, too


async def lens_departed(tx: Transaction, copy: Residency, lens_id: str, size: int, cause: str, *, parked: bool) -> None:
    """A lens is off its device alone, or out of host memory: rows and the event say so."""
    if parked:
        await tx.groups.lens_parked(lens_id, copy.host_id)
    else:
        await tx.groups.displace_lens(lens_id, copy.host_id)
    facts = {
        "lens_id": lens_id,
        "model_id": copy.model_id,
        "device": f"{copy.host_id}/{copy.device}",
        "freed_bytes": size,
        "cause": cause,
        "parked": parked,
    }
    await tx.emit("lens:evicted", lens_id, facts)


async def mark(tx: Transaction, evictions: Sequence[Eviction]) -> None:
    """Nobody else plans with what is about to leave."""
    for each in evictions:
        if each.lens_id:
            await tx.placement.lens_leaves(each.host_id, each.lens_id, None, parked=each.parked)
        elif each.cause != "park_limit":
            state = "parking" if each.parked else "unloading"
            await tx.placement.change(each.model_id, each.host_id, state=state, job_id=None)


async def leave(registry: Registry, placements: Sequence[Placement], taker: Taker) -> bool:
    """What the placements name leaves, what is parked first; false when something came into use, and all is undone.

    A caller who is cancelled leaves once everything is off, and `taker` does not come.

    Raises:
        LensmeshError: a host did not do it; all is undone.
    """
    try:
        return await to_the_end(_leave(registry, placements, taker))
    except asyncio.CancelledError:
        async with registry.store.transaction() as tx:
            await taker.withdraw(tx)
        raise


async def _leave(registry: Registry, placements: Sequence[Placement], taker: Taker) -> bool:
    copies = {(r.host_id, r.model_id): r for each in placements for r in each.host.shared_residents}
    evictions = [eviction for placement in placements for eviction in placement.evictions]
    order = sorted(evictions, key=lambda each: each.cause != "park_limit")
    for position, each in enumerate(order):
        copy = copies[each.host_id, each.model_id]
        try:
            gone = await (_lens_leaves if each.lens_id else _model_leaves)(registry, copy, each, taker)
        except LensmeshError:
            await _undo(registry, order[position:], taker)
            raise
        if not gone:
            await _undo(registry, order[position:], taker, busy=each)
            return False
        registry.gauges.evicted(each.cause)
    return True


async def _lens_leaves(registry: Registry, copy: Residency, each: Eviction, taker: Taker) -> bool:
    try:
        parked = await evict_lens(registry, copy, each.lens_id, park=each.parked)
    except Conflict:
        return False
    async with registry.store.transaction() as tx:
        await lens_departed(tx, copy, each.lens_id, each.bytes, each.cause, parked=parked)
        if each.cause != "park_limit":
            await taker.gain(tx, copy.host_id, each.bytes)
    registry.endings.ended(each.lens_id)
    return True


async def _model_leaves(registry: Registry, copy: Residency, each: Eviction, taker: Taker) -> bool:
    try:
        parked = await send_away(registry, copy, parks=each.parked)
    except Conflict:
        return False
    async with registry.store.transaction() as tx:
        await departed(tx, copy, cause=each.cause, wanted=False, evicted_for=taker.id, parked=parked)
        if each.cause != "park_limit":
            await taker.gain(tx, copy.host_id, each.bytes)
    return True


async def _undo(registry: Registry, left: Sequence[Eviction], taker: Taker, *, busy: Eviction | None = None) -> None:
    """What has not left stays."""
    async with registry.store.transaction() as tx:
        await taker.withdraw(tx)
        for each in left:
            in_use = each is busy
            if each.lens_id:
                await tx.placement.lens_stays(each.host_id, each.lens_id, 1 if in_use else None)
            elif each.cause != "park_limit":
                more = {"leases": 1} if in_use else {}
                await tx.placement.change(each.model_id, each.host_id, state="resident", **more)
