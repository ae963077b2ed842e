"""What leaves devices to make room: marked first, so that nobody else plans with it, then taken off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Protocol

from services.kit.errors import Conflict, Exhausted, LensmeshError, NotFound, Unsupported
from services.kit.waiting import to_the_end
from services.registry.domain import Eviction, Placement, Residency
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import departed, send_away
from services.registry.ports import Transaction

Going = tuple[Residency, Eviction]
"""What leaves, or the base of the lens that does, and why."""
Transactions = Callable[[], AbstractAsyncContextManager[Transaction]]


class Taker(Protocol):
    """What room is made for."""

    async def gain(self, tx: Transaction, host_id: str, size: int) -> None:
        """So many bytes of a host are free; those that it is to have are promised to it in the same transaction."""

    async def withdraw(self, tx: Transaction) -> None:
        """It does not come: nothing is promised to it any more."""


async def _evict_lens(registry: Registry, copy: Residency, lens_id: str, *, park: bool) -> bool:
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


async def _lens_departed(tx: Transaction, copy: Residency, each: Eviction, *, parked: bool) -> None:
    """A lens is off its device alone, or out of host memory: rows and the event say so."""
    if parked:
        await tx.groups.lens_parked(each.lens_id, copy.host_id)
    else:
        await tx.groups.displace_lens(each.lens_id, copy.host_id)
    facts = {
        "lens_id": each.lens_id,
        "model_id": copy.model_id,
        "device": f"{copy.host_id}/{copy.device}",
        "freed_bytes": each.bytes,
        "cause": each.cause,
        "parked": parked,
    }
    await tx.emit("lens:evicted", each.lens_id, facts)


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
    going = [(copies[each.host_id, each.model_id], each) for each in evictions]
    try:
        return await depart(registry, going, taker, registry.store.transaction)
    except LensmeshError:
        async with registry.store.transaction() as tx:
            await _stay(tx, going, taker)
        raise


async def depart(registry: Registry, going: list[Going], taker: Taker, transaction: Transactions) -> bool:
    """Take off what was marked, what is parked first; false when something came into use: it and the rest stay.

    Args:
        registry: the registry.
        going: what leaves; here afterwards is what has not left.
        taker: who gets the bytes; it does not come where something stays.
        transaction: begins what each departure is written in.

    Raises:
        LensmeshError: a host did not do it; it and the rest are marked still.
    """
    going.sort(key=lambda pair: pair[1].cause != "park_limit")
    while going:
        copy, each = going[0]
        try:
            if each.lens_id:
                parked = await _evict_lens(registry, copy, each.lens_id, park=each.parked)
            else:
                parked = await send_away(registry, copy, parks=each.parked)
        except Conflict:
            async with transaction() as tx:
                await _stay(tx, going, taker, busy=each)
            return False
        async with transaction() as tx:
            if each.lens_id:
                await _lens_departed(tx, copy, each, parked=parked)
            else:
                await departed(tx, copy, cause=each.cause, wanted=False, evicted=True, parked=parked)
            if each.cause != "park_limit":
                await taker.gain(tx, copy.host_id, each.bytes)
        registry.endings.ended(each.lens_id or each.model_id)
        registry.gauges.evicted(each.cause)
        del going[0]
    return True


async def _stay(tx: Transaction, going: Sequence[Going], taker: Taker, *, busy: Eviction | None = None) -> None:
    """What has not left stays; a load lets parked models go where it is placed anew."""
    await taker.withdraw(tx)
    for _, each in going:
        in_use = each is busy
        if each.lens_id:
            await tx.placement.lens_stays(each.host_id, each.lens_id, 1 if in_use else None)
        elif each.cause != "park_limit":
            more = {"leases": 1} if in_use else {}
            await tx.placement.change(each.model_id, each.host_id, state="resident", job_id=None, cause=None, **more)
