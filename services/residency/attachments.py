"""Lenses come to a model of a pool and leave it: attached from their files, parked alone, restored, taken off."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from services.kit import errors
from services.kit.waiting import to_the_end
from services.residency.lenses import Spec, needed
from services.residency.lenses import load as load_lens
from services.residency.memory import give_back
from services.residency.park import fetch, stow
from services.residency.resident import Attached, Resident, recognise, remember

if TYPE_CHECKING:
    from services.residency.pool import Pool


async def attach(pool: Pool, model_id: str, spec: Spec, *, parked: bool) -> Attached:
    """See `Pool.attach`."""
    async with _standing(pool, model_id, parked=parked) as resident:
        if spec.lens_id in resident.lenses:
            if resident.lenses[spec.lens_id].spec == spec:
                return resident.lenses[spec.lens_id]
            await to_the_end(_take_off(pool, resident, spec.lens_id, park=False))
        elif spec.lens_id in resident.parked:
            if resident.parked[spec.lens_id].spec == spec:
                return await to_the_end(_restore(pool, resident, resident.parked[spec.lens_id]))
            del resident.parked[spec.lens_id]
        require = pool.require if resident.state == "device" else pool.require_parking
        require(await pool.run(needed, spec, resident.base))
        if spec.source_model_id not in ("", model_id):
            async with pool.lease(spec.source_model_id) as source:
                lens = await pool.run(load_lens, spec, resident.base, source.record.base)
        else:
            lens = await pool.run(load_lens, spec, resident.base)
        attached = Attached(spec, lens)
        try:
            require(lens.nbytes)
            if resident.state == "device" or pool.device == "cpu":
                await pool.verify(resident, [attached])
        except BaseException:
            await pool.run(lens.detach)
            raise
        if resident.state == "parked" and pool.device != "cpu":
            await pool.run(remember, [attached])
        resident.lenses[spec.lens_id] = attached
        return attached


@asynccontextmanager
async def _standing(pool: Pool, model_id: str, *, parked: bool) -> AsyncIterator[Resident]:
    """The model stays where it is inside the block, and its lenses are ours to change."""
    resident = pool.get(model_id)
    async with nullcontext() if parked and resident.state == "parked" else pool.lease(model_id), resident.lock:
        yield resident


async def detach(pool: Pool, model_id: str, lens_id: str, *, park: bool) -> int:
    """See `Pool.detach`."""
    resident = pool.get(model_id)
    async with resident.lock:
        if lens_id in resident.lenses:
            return await to_the_end(_take_off(pool, resident, lens_id, park=park))
        if park and lens_id not in resident.parked:
            raise errors.NotFound("the lens is not attached", metadata={"lens_id": lens_id})
        dropped = None if park else resident.parked.pop(lens_id, None)
        return 0 if dropped is None else dropped.nbytes


async def _take_off(pool: Pool, resident: Resident, lens_id: str, *, park: bool) -> int:
    attached = resident.lenses[lens_id]
    if attached.leases:
        raise errors.Conflict(f"{attached.leases} calls use the lens", reason="IN_USE")
    if park:
        if attached.spec.source_model_id not in ("", resident.model_id):
            raise errors.Unsupported("a lens that reads another model is not parked alone")
        pool.require_parking(attached.nbytes)
    before, active = resident.total_bytes, resident.active
    del resident.lenses[lens_id]
    if active == lens_id:
        resident.active = None
    try:
        if park and pool.device != "cpu":
            await pool.run(remember, [attached])
        await (pool.run(stow, attached.lens, pool.device) if park else pool.run(attached.lens.detach))
    except Exception:
        resident.lenses[lens_id], resident.active = attached, active
        raise
    if park:
        resident.parked[lens_id] = attached
    else:
        await _inherit(pool, resident)
    if resident.state == "device":  # else its restore does
        await pool.verify(resident)
    del attached
    await pool.run(give_back, pool.device)
    return before - resident.total_bytes


async def _inherit(pool: Pool, resident: Resident) -> None:
    """Layers that a lens has left to parked ones alone go to host memory, or with these where it has no room."""
    for parked in list(resident.parked.values()):
        await pool.run(parked.lens.move, "cpu")
    if pool.parked_bytes > pool.park_bytes:
        resident.parked.clear()


async def _restore(pool: Pool, resident: Resident, attached: Attached) -> Attached:
    """A parked lens comes back or stays parked; one with which the model computes other bits is dropped."""
    target = "cpu"
    if resident.state == "device":
        pool.require(attached.nbytes)
        target = pool.device
    await pool.run(fetch, attached.lens, target)
    try:
        if resident.state == "device":
            await pool.run(recognise, [attached])
            await pool.verify(resident, [attached])
    except BaseException as error:
        await pool.run(stow, attached.lens, target)
        if isinstance(error, errors.Failed):
            del resident.parked[attached.spec.lens_id]
        raise
    attached.last_used = time.monotonic()
    resident.lenses[attached.spec.lens_id] = resident.parked.pop(attached.spec.lens_id)
    return attached
