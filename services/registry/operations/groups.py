"""Groups: create, read, delete, their status, and what is done with all their lenses at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.kit.errors import Exhausted, Invalid, LensmeshError, Unsupported
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.registry.domain import Beside, Caller, Group, Residency
from services.registry.failures import not_resident
from services.registry.job_ports import LoadLease
from services.registry.listing import Listed, Page
from services.registry.operations.lenses import bring, take_lens_off
from services.registry.operations.loading import await_job, bring_base, move_model
from services.registry.operations.parking import park_base, park_lens, require_parking
from services.registry.operations.planning import ASSUMED_BYTES_PER_SECOND
from services.registry.operations.registry import Registry
from services.registry.operations.serving import with_lenses

TOGETHER = 4
"""Lenses that a preload brings at the same time."""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Where a group's parts are."""

    group: Group
    residency: str
    """Of the base: device, parked or disk."""
    device: str | None
    resident_lens_ids: tuple[str, ...]
    fully_loaded: bool
    shared_bytes: int
    lens_bytes: int
    saved_bytes: int
    within_seconds: float
    cross_seconds: float


async def create_group(
    registry: Registry, caller: Caller, name: str, model_id: str, request: RequestKey, *, exclusive: bool
) -> Group:
    """Make a group on a base.

    Raises:
        NotFound: `MODEL_NOT_FOUND`.
    """
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is None:
            await tx.models.get(model_id)
            row: dict[str, Any] = {"id": new_id("grp"), "name": name, "model_id": model_id, "exclusive": exclusive}
            row["created_by"] = caller.subject
            once.answer = {"id": (await tx.groups.insert(row)).id}
        return await tx.groups.get(once.answer["id"])


async def get_group(registry: Registry, group_id: str) -> tuple[Group, int]:
    """One group, and its bytes with all lenses, estimated.

    Raises:
        NotFound: there is none.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        model = await tx.models.get(group.model_id)
    return group, estimated_bytes(group, model.memory_usage_bytes or model.estimated_memory_bytes or 0)


async def list_groups(registry: Registry, page: Page, model_id: str | None) -> tuple[Listed, list[int]]:
    """Groups, newest first, with their estimated bytes."""
    async with registry.store.transaction() as tx:
        listed = await tx.groups.page(page, model_id=model_id)
        models = [await tx.models.get(base) for base in {group.model_id for group in listed.rows}]
    bases = {model.id: model.memory_usage_bytes or model.estimated_memory_bytes or 0 for model in models}
    return listed, [estimated_bytes(group, bases[group.model_id]) for group in listed.rows]


def estimated_bytes(group: Group, base: int) -> int:
    """Base and every lens, measured where it is on a device."""
    return base + sum(lens.size_bytes if lens.charge_bytes is None else lens.charge_bytes for lens in group.lenses)


async def delete_group(registry: Registry, group_id: str) -> None:
    """Delete a group; its lenses leave the devices, their artifacts stay.

    Raises:
        NotFound: there is none.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        copies = await tx.placement.of_model(group.model_id)
    for lens in group.lenses:
        await take_lens_off(registry, copies, lens.id)
    async with registry.store.transaction() as tx:
        for lens in group.lenses:
            await tx.groups.remove_lens(lens.id)
        await tx.groups.delete(group_id)
        await tx.emit("group:deleted", group_id, {"group_id": group_id})


async def group_status(registry: Registry, group_id: str) -> GroupStatus:
    """Where a group's parts are, what sharing saves, and how long switches take.

    Raises:
        NotFound: there is none.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        model = await tx.models.get(group.model_id)
        copies = await tx.placement.of_model(group.model_id)
        within = await tx.groups.switch_seconds(group_id, "within")
        cross = await tx.groups.switch_seconds(group_id, "cross")
        speed = float(await tx.models.load_speed() or ASSUMED_BYTES_PER_SECOND)
    copy = next((c for c in copies if c.state == "resident"), None)
    parked = any(c.state == "parked" for c in copies)
    here = tuple(lens.id for lens in group.lenses if copy is not None and lens.id in copy.lens_ids)
    base = copy.charge_bytes if copy is not None else 0
    largest = max((lens.size_bytes for lens in group.lenses), default=0)
    return GroupStatus(
        group=group,
        residency="device" if copy is not None else "parked" if parked else "disk",
        device=f"{copy.host_id}/{copy.device}" if copy is not None else None,
        resident_lens_ids=here,
        fully_loaded=copy is not None and len(here) == len(group.lenses),
        shared_bytes=base,
        lens_bytes=sum(lens.charge_bytes or 0 for lens in group.lenses if lens.id in here),
        saved_bytes=base * max(0, len(here) - 1),
        within_seconds=within if within is not None else largest / speed,
        cross_seconds=cross or model.load_time_seconds or model.estimated_load_seconds or 0.0,
    )


async def analyze(registry: Registry, group_id: str, lens_ids: Sequence[str], query: Mapping[str, Any]) -> Any:
    """Read a text through lenses of a group, the active one when none is named; the host's answer.

    Raises:
        Invalid: no lens named and none active; neither text nor token_ids, or both; an intervention names a transcoder
            that is no lens of the model's groups.
        NotFound: no such group or lens.
        Conflict: `GROUP_NOT_RESIDENT`.
    """
    if bool(query["text"]) == bool(query["token_ids"]):
        raise Invalid.of("text", "give text or token_ids, and not both")
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        copies = await tx.placement.of_model(group.model_id)
    wanted = list(lens_ids) or [group.active_lens_id or ""]
    if not wanted[0]:
        raise Invalid.of("lens_ids", "must be given while no lens is active")
    lenses = [group.lens(lens_id) for lens_id in wanted]
    with registry.spread.over(registry, copies, wanted) as copy:
        if copy is None:
            raise not_resident(group_id, group.model_id)
        for lens in lenses:
            if lens.id not in copy.lens_ids:
                await bring(registry, lens, copy)
        query = {**query, "interventions": await with_lenses(registry, copy, query["interventions"])}
        async with registry.store.transaction() as tx:
            await tx.placement.touch(copy.model_id, copy.host_id)
            await tx.placement.touch_lenses(copy.host_id, wanted)
        return await registry.hosts.analyze(copy.address, copy.model_id, wanted, query)


async def preload_group(
    registry: Registry, caller: Caller, group_id: str, lens_ids: Sequence[str], request: RequestKey, *, parked: bool
) -> tuple[str, int]:
    """Queue a job that brings the base and the lenses to a device, or to host memory; its id and how many lenses.

    Raises:
        NotFound: no such group or lens.
        Unsupported: to host memory, where no device parks.
    """
    if parked:
        await require_parking(registry)
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is not None:
            return once.answer["job_id"], once.answer["total"]
        group = await tx.groups.get(group_id)
        wanted = [group.lens(lens_id).id for lens_id in lens_ids] or [lens.id for lens in group.lenses]
        job_id = new_id("job")
        once.answer = {"job_id": job_id, "total": len(wanted)}
        payload = {
            "group_id": group_id,
            "model_id": group.model_id,
            "lens_ids": wanted,
            "foreseen": False,
            "parked": parked,
        }
        await tx.enqueue_preload(job_id, payload, caller.subject)
    return job_id, len(wanted)


async def run_preload(registry: Registry, lease: LoadLease) -> dict[str, Any]:
    """Do the preload that a job stands for; a lens that fails does not hold up the others.

    What was asked for goes to host memory where no device has room.

    Raises:
        LensmeshError: the base could not be loaded.
    """
    group_id, wanted = lease.payload["group_id"], list(lease.payload["lens_ids"])
    foreseen = lease.payload["foreseen"]
    told = _Told(registry, lease, len(wanted))
    try:
        copy = await _preloaded(registry, lease, told)
    except Exhausted:
        if not foreseen:
            raise
        return {"group_id": group_id, "loaded": 0, "failed": wanted}  # nobody asked for it
    told.size, told.residency = copy.charge_bytes, "parked" if copy.state == "parked" else "device"
    await told.tell(None)
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
    turn = asyncio.Semaphore(TOGETHER)

    async def one(lens_id: str) -> None:
        async with turn:
            try:
                lens = group.lens(lens_id)
                if copy.state == "parked":
                    told.size += await park_lens(registry, lens, copy)
                else:
                    told.size += await bring(registry, lens, copy, evict=not foreseen)
                told.loaded += 1
            except LensmeshError as error:
                told.failed.append(lens_id)
                async with registry.store.transaction() as tx:
                    await tx.groups.lens_failed(lens_id, error.reason, error.message)
            await told.tell(lens_id)

    await lease.unless_stopped(asyncio.gather(*(one(lens_id) for lens_id in wanted)))
    return {
        "group_id": group_id,
        "loaded": told.loaded,
        "failed": sorted(told.failed),
        "residency": told.residency,
    }


async def _preloaded(registry: Registry, lease: LoadLease, told: _Told) -> Residency:
    """The base of a preload, where it was asked to be, else in host memory unless it was only foreseen."""
    model_id, foreseen = lease.payload["model_id"], lease.payload["foreseen"]
    if lease.payload.get("parked"):
        return await park_base(registry, lease, model_id, told.coming)
    beside = Beside(spares="all" if foreseen else "young")
    try:
        return await lease.unless_stopped(bring_base(registry, model_id, beside))
    except Exhausted as refusal:
        if foreseen:
            raise
        try:
            return await park_base(registry, lease, model_id, told.coming)
        except (Exhausted, Unsupported):
            raise refusal from None


@dataclass(slots=True)
class _Told:
    """How far a preload is, and its events."""

    registry: Registry
    lease: LoadLease
    total: int
    size: int = 0
    residency: str = "parked"
    loaded: int = 0
    failed: list[str] = field(default_factory=list)

    async def coming(self, percent: float) -> None:
        """While the base comes to host memory; a load onto a device has events of its own."""
        await self._tell(None, percent / (self.total + 1))

    async def tell(self, lens_id: str | None) -> None:
        """After a lens, or after the base alone."""
        await self._tell(lens_id, 100.0 * (self.loaded + len(self.failed) + 1) / (self.total + 1))

    async def _tell(self, lens_id: str | None, percent: float) -> None:
        figures = {"loaded": self.loaded, "total": self.total, "bytes": self.size, "progress": percent}
        group_id = self.lease.payload["group_id"]
        async with self.lease.commit() as tx:
            facts = {"group_id": group_id, "lens_id": lens_id, "task_id": self.lease.id}
            facts |= {"foreseen": self.lease.payload["foreseen"], "residency": self.residency}
            await tx.emit("group:preload", group_id, {**facts, **figures})
            await self.lease.progress(percent, figures)


async def move_group(
    registry: Registry, caller: Caller, group_id: str, device: str, request: RequestKey
) -> GroupStatus:
    """Move base and lenses to another device; answers when they are there.

    Raises:
        Conflict: `GROUP_NOT_RESIDENT`; `IN_USE` while leases are held.
        Exhausted: `INSUFFICIENT_MEMORY`.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        copies = await tx.placement.of_model(group.model_id)
    if not any(copy.state == "resident" for copy in copies):
        raise not_resident(group_id, group.model_id)
    started = await move_model(registry, caller, group.model_id, device, request)
    if started.task_id:
        await await_job(registry, started.task_id)
    return await group_status(registry, group_id)
