"""Switches to a group whose base is not on a device: queued, announced, planned, and done by a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import dropwhile
from typing import Any

from services.kit.errors import Conflict
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.registry.domain import Beside, Caller, Group, Lens, LoadPlan, Residency
from services.registry.job_ports import LoadLease
from services.registry.operations.admission import does_not_fit
from services.registry.operations.estimating import estimate_model
from services.registry.operations.lenses import restore_lenses, switch_lens
from services.registry.operations.loading import bring_base, ensure_resident
from services.registry.operations.registry import Registry
from services.registry.operations.room import plan as plan_lens
from services.registry.operations.turns import serving
from services.registry.ports import Switched, Transaction, Turn


@dataclass(frozen=True, slots=True)
class Queued:
    """A switch that waits for its turn."""

    job_id: str
    position: int
    """Its place among the switches that wait or run; 1 is next or running."""
    estimated_seconds: float
    plan: LoadPlan | None = None
    """Not told again to who asks again."""


async def switch(
    registry: Registry, caller: Caller, group_id: str, lens_id: str | None, request: RequestKey
) -> Switched | Queued:
    """Make a lens of a group the active one, or none; at once where the base is on a device, else by a queued job.

    Switches between groups take turns on each device, and users take turns among them.

    Raises:
        NotFound: no such group or lens.
        Exhausted: `INSUFFICIENT_MEMORY`: it would not fit an empty device either; nothing was queued.
        Unavailable: `NO_HOST`.
    """
    try:
        done = await switch_lens(registry, group_id, lens_id)
        registry.foresight.note(registry, caller, group_id, lens_id)
        return done
    except Conflict as error:
        if error.reason != "GROUP_NOT_RESIDENT":
            raise
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
    plan, seconds = await _plan(registry, group, lens_id)
    if all(placement.required_bytes > placement.host.budget_bytes for placement in plan.placements):
        raise does_not_fit(plan, registry.limits.max_resident_models)
    job_id = new_id("job")
    host_id = _target(plan)
    payload = {"group_id": group_id, "model_id": group.model_id, "lens_id": lens_id, "host_id": host_id}
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is not None:
            return Queued(**once.answer)
        await tx.enqueue_switch(job_id, payload, caller.subject)
        leaving = [asdict(eviction) for eviction in plan.best.evictions] if plan.best is not None else []
        own, *behind = await _from(tx, host_id, job_id)
        await _announce(tx, [own], evictions=leaving)
        await _announce(tx, behind)
        queued = Queued(job_id, own.position, seconds)
        once.answer = asdict(queued)
    registry.foresight.note(registry, caller, group_id, lens_id)
    return replace(queued, plan=plan)


async def plan_switch(registry: Registry, group_id: str, lens_id: str | None) -> tuple[LoadPlan | None, float]:
    """What `switch` would do: where the base goes and what leaves for it, or for the lens; expected seconds.

    There is no plan where both are on the device.

    Raises:
        NotFound: no such group or lens.
        Unavailable: `NO_HOST`.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        if lens_id is not None:
            group.lens(lens_id)
        copy = await serving(tx, group.model_id)
        if copy is not None:
            seconds = await tx.groups.switch_seconds(group_id, "within") or 0.0
    if copy is not None:
        absent = None if lens_id is None or lens_id in copy.lens_ids else group.lens(lens_id)
        return None if absent is None else await _plan_lens(registry, absent, copy), seconds
    return await _plan(registry, group, lens_id)


async def run_switch(registry: Registry, lease: LoadLease) -> dict[str, Any]:
    """Do the switch that a job stands for: others are parked or unloaded, the base and the lens come; its result.

    Raises:
        LensmeshError: the base could not be loaded, or the lens not be attached.
    """
    start = time.perf_counter()
    group_id, lens_id = lease.payload["group_id"], lease.payload["lens_id"]
    async with lease.commit() as tx:  # whoever was before it has ended: the others are one place further
        await _announce(tx, (await _from(tx, lease.payload["host_id"], lease.id))[1:])
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        beside = await _company(tx, group, lens_id)
    copy = await lease.unless_stopped(bring_base(registry, group.model_id, beside, first=lease.payload["host_id"]))
    for source, _ in beside.sources:
        await lease.unless_stopped(ensure_resident(registry, copy.host_id, source))
    # The job ends when the group is whole; lenses that read a source waited for it when the base was loaded.
    await lease.unless_stopped(restore_lenses(registry, copy.model_id, copy.host_id))
    switched = await switch_lens(registry, group_id, lens_id, began=start)
    return {"group_id": group_id, "lens_id": lens_id, "device": copy.device, "seconds": switched.seconds}


async def tell_places(registry: Registry, host_id: str) -> None:
    """Tell everybody the places of the switches that wait behind the next one: one of them has left or come."""
    async with registry.store.transaction() as tx:
        await _announce(tx, (await tx.switch_turns(host_id))[1:])


async def _from(tx: Transaction, host_id: str, job_id: str) -> Sequence[Turn]:
    """A switch and those that take their turns behind it."""
    turns = await tx.switch_turns(host_id)
    return list(dropwhile(lambda turn: turn.job_id != job_id, turns))


async def _announce(tx: Transaction, turns: Sequence[Turn], **more: Any) -> None:
    """Tell everybody the places of switches."""
    for turn in turns:
        facts = {"group_id": turn.group_id, "lens_id": turn.lens_id, "kind": "cross", "task_id": turn.job_id}
        await tx.emit("group:switching", turn.group_id, {**facts, "position": turn.position, **more})


def _target(plan: LoadPlan) -> str:
    """The host that a queued switch is for: the best one now, or else once what is in use there has ended."""
    able = (each for each in plan.placements if each.required_bytes <= each.host.budget_bytes)
    return (plan.best or next(able)).host.host_id


async def _company(tx: Transaction, group: Group, lens_id: str | None) -> Beside:
    """What the group needs beside its base: all its lenses and their sources; where that fits nowhere, the one lens."""
    whole = await _beside(tx, group.lenses)
    hosts = await tx.placement.hosts()
    model = await tx.models.get(group.model_id)
    size = (model.memory_usage_bytes or model.estimated_memory_bytes or 0) + sum(
        size for _, size in (*whole.sources, *whole.lenses)
    )
    if any(size <= host.budget_bytes - host.reserved_bytes for host in hosts):
        return whole
    return await _beside(tx, [lens for lens in group.lenses if lens.id == lens_id])


async def _beside(tx: Transaction, lenses: Sequence[Lens]) -> Beside:
    named = dict.fromkeys(lens.activation_source_model_id for lens in lenses)
    models = [await tx.models.get(name) for name in named if name]
    return Beside(
        sources=tuple((each.id, each.memory_usage_bytes or each.estimated_memory_bytes or 0) for each in models),
        lenses=tuple((lens.id, lens.size_bytes) for lens in lenses),
    )


async def _plan_lens(registry: Registry, lens: Lens, copy: Residency) -> LoadPlan:
    """What leaves for a lens of a base that is on a device, and for the model it reads."""
    if source := lens.activation_source_model_id:
        async with registry.store.transaction() as tx:
            copies = await tx.placement.of_model(source)
        if not any(each.host_id == copy.host_id and each.state == "resident" for each in copies):
            beside = Beside(sources=((copy.model_id, 0),), lenses=((lens.id, lens.size_bytes),))
            return await estimate_model(registry, source, None, f"{copy.host_id}/{copy.device}", beside)
    return await plan_lens(registry, lens, copy)


async def _plan(registry: Registry, group: Group, lens_id: str | None) -> tuple[LoadPlan, float]:
    async with registry.store.transaction() as tx:
        beside = await _company(tx, group, lens_id)
    plan = await estimate_model(registry, group.model_id, None, "", beside)
    async with registry.store.transaction() as tx:
        measured = await tx.groups.switch_seconds(group.id, "cross")
    return plan, plan.estimated_seconds if measured is None else measured
