"""A load while it runs: evict, load, publish; and how the ledger is put right however it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from services.kit.errors import Exhausted, Failed, LensmeshError, Unavailable
from services.registry.domain import Eviction, Host, HostedModel, Load, Model, Residency
from services.registry.failures import insufficient_memory
from services.registry.job_ports import LoadLease
from services.registry.operations.admission import Order, accept
from services.registry.operations.leaving import Going, depart
from services.registry.operations.lenses import restore_lenses
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import clear_processes, take_off, unload_copies
from services.registry.ports import LoadStep, Transaction

STEP_PERCENT = 5.0


@dataclass(frozen=True, slots=True)
class _Load:
    """A load's place on a device: what room is made for, see `leaving.Taker`."""

    id: str
    """Its job."""

    async def gain(self, tx: Transaction, host_id: str, size: int) -> None:
        await tx.placement.charge(self.id, host_id, size)

    async def withdraw(self, tx: Transaction) -> None:
        for residency in await tx.placement.of_job(self.id):
            if residency.state == "loading":
                await tx.placement.remove(residency.model_id, residency.host_id)


async def run_load(registry: Registry, lease: LoadLease) -> dict[str, Any]:
    """Do the load that a job stands for; the job's result.

    Raises:
        LensmeshError: it failed. Unless it is tried again, the model is `failed` and the ledger is as before.
    """
    try:
        model, residency, host = await _prepare(registry, lease)
        loaded, last = await _load_making_room(registry, lease, model, residency, host)
        await lease.checkpoint()  # what nobody wants any more has no row, and leaves its host for that
        await lease.insist(partial(_publish, registry, lease, host, loaded, last))
    except LensmeshError as error:
        if not error.transient or lease.last_attempt:
            async with lease.commit() as tx:
                await settle(registry, tx, lease.id, error)
        raise
    finally:
        registry.endings.ended(lease.id)
    await _leave_old_hosts(registry, model.id, residency.host_id, Order.of(lease.payload))
    with_lenses = bool(Order.of(lease.payload).beside.lenses)
    await restore_lenses(registry, model.id, residency.host_id, beside=with_lenses)
    figures = {"memory_usage_bytes": loaded.memory_bytes, "load_time_seconds": last.seconds}
    return {"model_id": model.id, "device": host.name, **figures}


async def settle(registry: Registry, tx: Transaction, job_id: str, error: LensmeshError) -> None:
    """A load ended without its model: the ledger is as before it, and model and event say why. May be repeated.

    A cancelled one (reason `CANCELLED`) leaves the model as it was before the load.
    """
    load = await tx.models.find_load(job_id)
    if load is None:
        return
    model = await tx.models.get(load.model_id, lock=True)
    for residency in await tx.placement.of_job(job_id):
        await _let_go(tx, residency)
    await tx.placement.lenses_stay(job_id)
    if load.outcome != "running":
        return
    cancelled = error.reason == "CANCELLED"
    outcome = "cancelled" if cancelled else "failed"
    await tx.models.end_load(job_id, outcome, error_code=error.reason, error_message=error.message)
    registry.gauges.load_ended("cancelled" if cancelled else error.reason, load.quantization, 0.0, None)
    if model.status == "loading":  # else another copy serves
        await _tell_end(tx, model, load, error, cancelled=cancelled)


async def _tell_end(tx: Transaction, model: Model, load: Load, error: LensmeshError, *, cancelled: bool) -> None:
    status = ("unloaded" if model.loaded_at else "pending") if cancelled else "failed"
    failure = {} if cancelled else {"error_code": error.reason, "error_message": error.message}
    await tx.models.update(model.id, status=status, progress=0.0, wanted=model.wanted and not cancelled, **failure)
    facts = {"model_id": model.id, "status": status, "task_id": load.id, "host_id": load.host_id}
    if cancelled:
        await tx.emit("model:unloaded", model.id, {**facts, "cause": "cancelled", "freed_bytes": 0})
        return
    details = {name: value for name, value in error.metadata.items() if isinstance(value, str | int | float)}
    await tx.emit("model:failed", model.id, {**facts, **failure, "details": details})


async def _prepare(registry: Registry, lease: LoadLease) -> tuple[Model, Residency, Host]:
    """The place on a device that the job holds, empty: what had to leave has left.

    A job that lost its place (its host is gone, or a person retries it) is placed anew, as is one whose victim came
    into use meanwhile.
    """
    while True:
        async with lease.commit() as tx:
            model = await tx.models.get(lease.payload["model_id"], lock=True)
            held = await tx.placement.of_job(lease.id)
            mine = next((residency for residency in held if residency.state == "loading"), None)
            live = {host.host_id: host for host in await tx.placement.hosts()}
            if mine is None or mine.host_id not in live:
                mine, held = await _place_anew(registry, tx, lease, model, held)
                live = {host.host_id: host for host in await tx.placement.hosts()}
        host = live[mine.host_id]
        if await depart(registry, _going(lease.id, held, host), _Load(lease.id), lease.commit):
            return model, mine, host


def _going(job_id: str, held: Sequence[Residency], host: Host) -> list[Going]:
    """What is marked to leave for a load, as its plan said."""
    going: list[Going] = []
    for copy in held:
        if copy.moving and copy.state != "loading":
            cause, parks = copy.cause or "memory", copy.state == "parking"
            going.append((copy, Eviction(copy.model_id, copy.host_id, copy.bytes, cause, parks)))
    for copy in host.shared_residents:
        for lens in (lens for lens in copy.lenses if lens.job_id == job_id):
            cause, parks = "park_limit" if lens.stowed else "memory", lens.state == "parking"
            going.append((copy, Eviction(copy.model_id, copy.host_id, lens.bytes, cause, parks, lens.lens_id)))
    return going


async def _place_anew(
    registry: Registry, tx: Transaction, lease: LoadLease, model: Model, held: list[Residency]
) -> tuple[Residency, list[Residency]]:
    for residency in held:
        await _let_go(tx, residency)
    await tx.placement.lenses_stay(lease.id)
    await accept(registry, tx, model, Order.of(lease.payload), job_id=lease.id)
    held = await tx.placement.of_job(lease.id)
    return next(residency for residency in held if residency.state == "loading"), held


async def _let_go(tx: Transaction, residency: Residency) -> None:
    """The load no longer holds it: it stays where it is, and the place of the model that did not come is free."""
    if residency.state == "loading":
        await tx.placement.remove(residency.model_id, residency.host_id)
    else:
        state = "parked" if residency.state == "parked" else "resident"
        await tx.placement.change(residency.model_id, residency.host_id, state=state, job_id=None, cause=None)


async def _load_making_room(
    registry: Registry, lease: LoadLease, model: Model, residency: Residency, host: Host
) -> tuple[HostedModel, LoadStep]:
    """The load; when the device runs out of memory, whatever the ledger says, once more after all idle models left.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`: nothing idle was left to make room.
    """
    try:
        return await _load(registry, lease, model, residency, host)
    except Exhausted as error:
        if error.reason != "DEVICE_OOM":
            raise
    await clear_processes(registry, host.host_id)
    try:
        return await _load(registry, lease, model, residency, host)
    except Exhausted as error:
        if error.reason != "DEVICE_OOM":
            raise
        refused = insufficient_memory(residency.required_bytes, host.budget_bytes - host.used_bytes, host.name)
        refused.transient = True  # what took the memory without being in the ledger may be gone at the next attempt
        raise refused from error


async def _load(
    registry: Registry, lease: LoadLease, model: Model, residency: Residency, host: Host
) -> tuple[HostedModel, LoadStep]:
    """The model on its host, and the last step that brought it; one that was there already took no time."""
    await lease.checkpoint()
    incarnation, present = await registry.hosts.state(host.address)
    for hosted in present:
        if hosted.model_id == model.id:
            if hosted.quantization != residency.quantization:
                await take_off(registry, residency, 0.0)
            elif hosted.parked:
                return await _restore(registry, host, hosted)
            else:
                return hosted, LoadStep(100.0, 0, 0, "It was there already", hosted)
    async with registry.store.transaction() as tx:
        expected = await tx.placement.fingerprint(model.id, host.host_id, residency.quantization, incarnation)
    steps = registry.hosts.load(
        host.address,
        model.id,
        model.files,
        residency.quantization,
        digest=model.digest or "",
        fingerprint=expected,
    )
    told = -STEP_PERCENT
    async with aclosing(steps):
        while (step := await lease.unless_stopped(anext(steps, None))) is not None:
            if step.model is not None:
                return step.model, step
            if step.percent >= told + STEP_PERCENT:
                told = step.percent - step.percent % STEP_PERCENT
                with suppress(Unavailable):  # the weights do not wait for the database
                    await _tell(lease, model.id, step)
    raise Failed("The host ended the load without a result", reason="MODEL_LOAD_FAILED")


async def _restore(registry: Registry, host: Host, hosted: HostedModel) -> tuple[HostedModel, LoadStep]:
    """Move a parked model back; its lenses come with it."""
    start = time.perf_counter()
    model = await registry.hosts.restore(host.address, hosted.model_id)
    size = model.memory_bytes + sum(lens.memory_bytes for lens in model.lenses.values() if not lens.parked)
    return model, LoadStep(100.0, size, size, "Restored from host memory", model, time.perf_counter() - start)


async def _tell(lease: LoadLease, model_id: str, step: LoadStep) -> None:
    figures = {"bytes_done": step.bytes_done, "bytes_total": step.bytes_total}
    async with lease.commit() as tx:
        model = await tx.models.get(model_id, lock=True)
        if model.status == "loading":
            await tx.models.update(model_id, progress=step.percent)
        facts = {"model_id": model_id, "status": "loading", "progress": step.percent, "task_id": lease.id}
        await tx.emit("model:loading", model_id, {**facts, "message": step.message, **figures})
        await lease.progress(step.percent, figures)


async def _publish(registry: Registry, lease: LoadLease, host: Host, loaded: HostedModel, last: LoadStep) -> None:
    """Row, ledger and event say that the model is there, in one transaction."""
    seconds = last.seconds or None
    async with lease.commit() as tx:
        model = await tx.models.get(loaded.model_id, lock=True)
        loaded_at = await adopt(tx, host, loaded)
        changes: dict[str, Any] = {
            "status": "ready",
            "progress": 100.0,
            "memory_usage_bytes": loaded.memory_bytes,
            "fingerprint": loaded.fingerprint or None,
            "error_code": None,
            "error_message": None,
        }
        if seconds is not None:
            changes["load_time_seconds"] = seconds
        if last.digest and not model.digest:
            changes["digest"] = last.digest
        await tx.models.update(model.id, loaded_at=loaded_at, **changes)
        await tx.models.end_load(lease.id, "ready", memory_bytes=loaded.memory_bytes, seconds=seconds)
        await tx.emit("model:ready", model.id, ready_facts(model, host, loaded, seconds, lease.id))
    need = Order.of(lease.payload).need
    expected = need.weights + need.quantization_state
    error = abs(loaded.memory_bytes - expected) / loaded.memory_bytes if loaded.memory_bytes else None
    registry.gauges.load_ended("ready", loaded.quantization, last.seconds, error)


def ready_facts(
    model: Model, host: Host, loaded: HostedModel, seconds: float | None = None, task_id: str = ""
) -> dict[str, Any]:
    """Facts of the event `model:ready`."""
    return {
        "model_id": model.id,
        "status": "ready",
        "memory_usage_bytes": loaded.memory_bytes,
        "load_time_seconds": seconds if seconds is not None else (model.load_time_seconds or 0.0),
        "device": host.name,
        "task_id": task_id,
        "fell_back_to_cpu": model.fell_back_to_cpu,
    }


async def adopt(tx: Transaction, host: Host, hosted: HostedModel) -> datetime:
    """Write down that a host holds a model, with what it really costs; since when it does."""
    await tx.placement.put(
        hosted.model_id,
        host.host_id,
        state="parked" if hosted.parked else "resident",
        **({"job_id": None} if hosted.parked else {}),
        quantization=hosted.quantization,
        required_bytes=hosted.memory_bytes,
        charge_bytes=hosted.memory_bytes,
        leases=hosted.leases,
        active_lens_id=hosted.active_lens_id,
    )
    if hosted.fingerprint:
        await tx.placement.keep_fingerprint(
            hosted.model_id, host.host_id, hosted.quantization, host.incarnation, hosted.fingerprint
        )
    return await tx.placement.arrived(hosted.model_id, host.host_id)


async def _leave_old_hosts(registry: Registry, model_id: str, host_id: str, order: Order) -> None:
    old = tuple(host for host in order.leaves if host != host_id)
    if not old:
        return
    await unload_copies(registry, model_id, wait_seconds=30.0, cause="moved", only=old)
    async with registry.store.transaction() as tx:
        model = await tx.models.update(model_id, wanted=True)
        facts = {"model_id": model_id, "status": model.status, "device": model.device or "", "from": list(old)}
        await tx.emit("model:moved", model_id, facts)


async def settle_abandoned(registry: Registry) -> None:
    """Settle loads whose job ended without a handler: cancelled in the queue, or crashed too often."""
    async with registry.store.transaction() as tx:
        abandoned = await tx.models.abandoned_loads()
    for job_id in abandoned:
        async with registry.store.transaction() as tx:
            _, failure = await tx.job_outcome(job_id)
            await settle(registry, tx, job_id, failure)
        registry.endings.ended(job_id)
