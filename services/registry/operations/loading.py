"""Loads as callers ask for them: plan first, then accept, or say that there is nothing to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from services.kit.errors import Conflict, LensmeshError, Unavailable
from services.kit.requests import RequestKey
from services.registry.domain import ALONE, Beside, Caller, Host, LoadPlan, Model, Residency
from services.registry.operations.admission import Order, accept, count_load, does_not_fit, plan_order
from services.registry.operations.estimating import estimate_model, inspected, need_of, plan
from services.registry.operations.registry import Registry, no_host
from services.registry.operations.unloading import unload_copies
from services.registry.ports import Transaction


@dataclass(frozen=True, slots=True)
class Started:
    """What a load request led to."""

    model_id: str
    status: str
    task_id: str
    message: str
    plan: LoadPlan | None = None


async def load_model(
    registry: Registry,
    caller: Caller,
    model_id: str,
    request: RequestKey,
    *,
    quantization: str | None,
    device: str,
    fall_back: bool,
) -> Started:
    """Start to load a model; the row is `loading` when this answers. A ready model stays as it is.

    Another quantization than the resident one is a reload: the old copies leave first.

    Raises:
        NotFound: `MODEL_NOT_FOUND`.
        Conflict: `ALREADY_LOADING`; ready on another device than asked for; `IN_USE` for a reload under a lease.
        Exhausted: `INSUFFICIENT_MEMORY` or `QUOTA_EXCEEDED`; nothing changed.
        Unavailable: `NO_HOST`, or a hub that does not answer.
    """
    model = await inspected(registry, model_id)
    stored_as = quantization or model.quantization
    need, seconds = await need_of(registry, model.files, stored_as, model_id=model_id)
    order = Order(stored_as, caller.subject, need, seconds, device=device, fall_back=fall_back)
    await _make_way_for_reload(registry, model_id, order)
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is not None:
            return Started(**once.answer)
        started = await _start(registry, tx, caller, model_id, order)
        once.answer = asdict(replace(started, plan=None))
        return started


async def plan_of_load(
    registry: Registry, model_id: str, *, quantization: str | None, device: str, fall_back: bool
) -> Started:
    """What `load_model` would do; changes nothing."""
    model = await inspected(registry, model_id)
    stored_as = quantization or model.quantization
    need, seconds = await need_of(registry, model.files, stored_as, model_id=model_id)
    copy_of = (model_id, stored_as)
    found = await plan(registry, need, device=device, seconds=seconds, fall_back=fall_back, copy_of=copy_of)
    best = found.best
    message = f"It would load on {best.device}" if best is not None else "It fits nowhere"
    return Started(model_id, model.status, "", message, found)


async def move_model(registry: Registry, caller: Caller, model_id: str, device: str, request: RequestKey) -> Started:
    """Load a model on another device; the copy that served leaves when the new one is ready.

    Raises:
        Conflict: it is not on a device, or loading; `IN_USE` while leases are held.
        Exhausted: see `load_model`.
    """
    model = await inspected(registry, model_id)
    need, seconds = await need_of(registry, model.files, model.quantization, model_id=model_id)
    order = Order(model.quantization, caller.subject, need, seconds, device=device)
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is not None:
            return Started(**once.answer)
        started = await _move(registry, tx, caller, model_id, order)
        once.answer = asdict(replace(started, plan=None))
        return started


async def _move(registry: Registry, tx: Transaction, caller: Caller, model_id: str, order: Order) -> Started:
    model = await tx.models.get(model_id, lock=True)
    copies = await tx.placement.of_model(model_id)
    _refuse_unless_movable(model, copies)
    hosts = await tx.placement.hosts()
    there = {host.host_id for host in hosts if host.answers_to(order.device)}
    if not there:
        raise no_host(order.device)
    here = next((copy for copy in copies if copy.state == "resident" and copy.host_id in there), None)
    if here is not None:
        return Started(model_id, model.status, "", f"It is on {here.host_id}/{here.device} already")
    await count_load(registry, tx, caller)
    leaves = tuple(copy.host_id for copy in copies if copy.host_id not in there)
    job, found = await accept(registry, tx, model, replace(order, quantization=model.quantization, leaves=leaves))
    return Started(model_id, "loading", job, f"It moves to {found.best and found.best.device}", found)


async def ensure_resident(
    registry: Registry, host_id: str, model_id: str, beside: Beside = ALONE, *, anywhere: bool = False
) -> Residency:
    """Where a model is in one host process, after loading it there if need be, with room for what shall be beside it.

    Where it may be `anywhere`, one that came to another process in the meantime does as well.

    Raises:
        NotFound: no such model or host.
        Exhausted: `INSUFFICIENT_MEMORY`.
        LensmeshError: the load failed, for the reason it gives.
    """
    started = ""
    while True:
        async with registry.store.transaction() as tx:
            here = next((r for r in await tx.placement.of_model(model_id) if r.host_id == host_id), None)
            if started and (here is None or here.job_id != started):
                load = await tx.models.find_load(started)
                if load is not None and load.failure is not None:
                    raise load.failure
            if here is not None and here.state == "resident":
                await tx.placement.touch(model_id, host_id)
                return here
        if here is not None and here.state not in ("parked", "lost"):
            started = (here.job_id or "") if here.state == "loading" else ""
            await registry.endings.wait(here.job_id or model_id, 1.0 if here.state == "loading" else 0.2)
            continue
        started, host_id = await load_on(registry, host_id, model_id, beside, anywhere=anywhere)


async def bring_base(registry: Registry, model_id: str, beside: Beside = ALONE, *, first: str = "") -> Residency:
    """The copy of a model that serves, after loading one where it fits best, with room for what shall be beside it.

    Args:
        registry: the registry.
        model_id: the model.
        beside: see `Beside`.
        first: the host that is to take it, if it fits there.

    Raises:
        Exhausted: it fits nowhere.
        LensmeshError: as `ensure_resident`.
    """
    placed = await _placed(registry, model_id)
    if placed is None:
        found = await estimate_model(registry, model_id, None, "", beside)
        if found.best is not None:
            fitting = {placement.host.host_id for placement in found.placements if placement.fits}
            placed = first if first in fitting else found.best.host.host_id
        elif (placed := await _placed(registry, model_id)) is None:  # else it is what takes the room, by now
            raise does_not_fit(found, registry.limits.max_resident_models)
    return await ensure_resident(registry, placed, model_id, beside, anywhere=True)


async def _placed(registry: Registry, model_id: str) -> str | None:
    """The host where a model is, or will be in a moment."""
    async with registry.store.transaction() as tx:
        copies = await tx.placement.of_model(model_id)
    return next((copy.host_id for copy in copies if copy.state in ("resident", "loading")), None)


async def await_job(registry: Registry, job_id: str) -> None:
    """Until the job of a load or move has done everything.

    Raises:
        LensmeshError: it failed, for the reason it gives.
    """
    while True:
        async with registry.store.transaction() as tx:
            state, failure = await tx.job_outcome(job_id)
        if state == "completed":
            return
        if state in ("failed", "cancelled"):
            raise failure
        await registry.endings.wait(job_id, 0.2)


async def restore(registry: Registry, model_id: str) -> None:
    """Bring back a wanted model whose device was lost, or that is marked for preload; a refusal is its failure.

    One that had fallen back to the CPU may do so again.
    """
    try:
        model = await inspected(registry, model_id)
        need, seconds = await need_of(registry, model.files, model.quantization, model_id=model_id)
        async with registry.store.transaction() as tx:
            model = await tx.models.get(model_id, lock=True)
            if not model.wanted or model.status not in ("pending", "unloaded"):
                return
            order = Order(model.quantization, model.created_by, need, seconds, cause="restore")
            await accept(registry, tx, model, replace(order, fall_back=model.fell_back_to_cpu))
    except Unavailable:
        return  # nobody to ask yet; the next round tries again
    except LensmeshError as error:
        async with registry.store.transaction() as tx:
            failure = {"error_code": error.reason, "error_message": error.message}
            await tx.models.update(model_id, status="failed", **failure)
            await tx.emit("model:failed", model_id, {"model_id": model_id, "status": "failed", **failure})


async def load_on(
    registry: Registry, host_id: str, model_id: str, beside: Beside, *, anywhere: bool = False
) -> tuple[str, str]:
    """Accept a load for one host process; the id of its job, of another's where one was faster, and its host."""
    model = await inspected(registry, model_id)
    need, seconds = await need_of(registry, model.files, model.quantization, model_id=model_id)
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id, lock=True)
        host = await tx.placement.lock_host(host_id)
        for residency in await tx.placement.of_model(model_id):
            there = residency.host_id == host_id and residency.state not in ("parked", "lost")
            if there or (anywhere and residency.state in ("loading", "resident")):
                return residency.job_id or "", residency.host_id
        order = Order(
            model.quantization,
            model.created_by,
            need,
            seconds,
            device=host.name,
            cause="preload" if beside.spares else "service",
            beside=beside,
        )
        job, _ = await accept(registry, tx, model, order)
        return job, host_id


async def _make_way_for_reload(registry: Registry, model_id: str, order: Order) -> None:
    """Unload copies of another quantization, once it is certain that the new one fits then.

    Raises:
        Conflict: `IN_USE`.
        Exhausted: it would not fit; nothing changed.
    """
    async with registry.store.transaction() as tx:
        copies = await tx.placement.of_model(model_id)
        hosts = await tx.placement.hosts()
    old = [c for c in copies if c.state in ("resident", "parked") and c.quantization != order.quantization]
    if not old:
        return
    leased = sum(copy.leases for copy in old)
    if leased:
        raise _leased(model_id, leased)
    without = [_without(host, old) for host in hosts]
    if not any(host.answers_to(order.device) for host in hosts):
        raise no_host(order.device)
    plan_order(order, without, registry.limits, model_id)
    await unload_copies(registry, model_id, wait_seconds=0.0, cause="reload")


def _without(host: Host, old: list[Residency]) -> Host:
    """A host and its ledger as they will be once copies have left it and the other processes of its device."""

    def back(process: Host) -> int:
        return sum(copy.bytes for copy in old if copy.host_id == process.host_id and copy.state == "resident")

    def stay(process: Host) -> tuple[Residency, ...]:
        gone = {(copy.host_id, copy.model_id) for copy in old}
        return tuple(r for r in process.residents if (r.host_id, r.model_id) not in gone)

    return replace(
        host,
        used_bytes=host.used_bytes - back(host),
        cap_bytes=None if host.cap_bytes is None else host.cap_bytes + sum(back(other) for other in host.siblings),
        residents=stay(host),
        siblings=tuple(replace(other, residents=stay(other)) for other in host.siblings),
    )


async def _start(registry: Registry, tx: Transaction, caller: Caller, model_id: str, order: Order) -> Started:
    model = await tx.models.get(model_id, lock=True)
    if model.status == "loading":
        raise _already_loading(model_id, await tx.placement.of_model(model_id))
    if model.status == "ready":
        hosts = {h.host_id: h for h in await tx.placement.hosts()}
        copies = [c for c in await tx.placement.of_model(model_id) if c.state == "resident" and c.host_id in hosts]
        if any(hosts[copy.host_id].answers_to(order.device) for copy in copies):
            await tx.models.update(model_id, wanted=True)
            return Started(model_id, "ready", "", "It is ready already")
        raise Conflict(
            f"Model {model_id} is ready on {model.device}; move it instead",
            metadata={"model_id": model_id, "device": model.device or ""},
        )
    await count_load(registry, tx, caller)
    job, found = await accept(registry, tx, model, order)
    where = found.best.device if found.best is not None else ""
    note = ", on the CPU because nothing else has room" if found.fell_back else ""
    return Started(model_id, "loading", job, f"Model loading initiated on {where}{note}", found)


def _already_loading(model_id: str, copies: list[Residency]) -> Conflict:
    task = next((copy.job_id for copy in copies if copy.state == "loading"), None)
    return Conflict(
        f"Model {model_id} is loading already",
        reason="ALREADY_LOADING",
        metadata={"model_id": model_id, "task_id": task or ""},
    )


def _leased(model_id: str, leases: int) -> Conflict:
    return Conflict(
        f"Model {model_id} is in use by {leases} running forwards or jobs",
        reason="IN_USE",
        metadata={"model_id": model_id, "leases": leases},
    )


def _refuse_unless_movable(model: Model, copies: list[Residency]) -> None:
    if any(copy.state == "loading" for copy in copies):
        raise _already_loading(model.id, copies)
    if not any(copy.state == "resident" for copy in copies):
        raise Conflict(
            f"Model {model.id} is {model.status}, not on a device",
            metadata={"model_id": model.id, "status": model.status},
        )
    leases = sum(copy.leases for copy in copies)
    if leases:
        raise _leased(model.id, leases)
