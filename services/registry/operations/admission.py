"""Whether a load may start, and what the ledger says from that moment on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from services.kit.errors import Exhausted
from services.kit.ids import new_id
from services.registry.domain import ALONE, Beside, Caller, Host, LoadPlan, Model, Need
from services.registry.failures import insufficient_memory
from services.registry.operations.estimating import on_its_terms
from services.registry.operations.planning import plan_load
from services.registry.operations.registry import Limits, Registry, no_host
from services.registry.ports import Transaction


@dataclass(frozen=True, slots=True)
class Order:
    """A load as it was asked for; the payload of its job."""

    quantization: str
    subject: str
    """Who asked."""
    need: Need
    seconds: float
    """Expected duration."""
    device: str = ""
    """`cpu`, `cuda:0`, `host` or `host/device`; the best one when empty."""
    fall_back: bool = False
    """Use the CPU when no other device has room."""
    cause: str = "user"
    """user, service, preload or restore."""
    leaves: tuple[str, ...] = field(default=())
    """Hosts that give the model up once it is on the new one (a move)."""
    beside: Beside = ALONE
    """What shall have room there, too."""

    def payload(self, model_id: str) -> dict[str, Any]:
        """As plain JSON."""
        return {"model_id": model_id, "order": asdict(self)}

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Order:
        """Read it back."""
        order = payload["order"]
        pairs = {kind: tuple((name, size) for name, size in order["beside"][kind]) for kind in ("sources", "lenses")}
        beside = Beside(**{**order["beside"], **pairs})
        read = {"need": Need(**order["need"]), "leaves": tuple(order["leaves"]), "beside": beside}
        return cls(**{**order, **read})


async def count_load(registry: Registry, tx: Transaction, caller: Caller) -> None:
    """Refuse a user's load beyond the hourly limit; the claim `loads_per_hour` of the token replaces the setting.

    Raises:
        Exhausted: `QUOTA_EXCEEDED`, with the time after which a retry makes sense.
    """
    if caller.internal:
        return
    limit = registry.limits.loads_per_hour if caller.loads_per_hour is None else caller.loads_per_hour
    loads, seconds = await tx.models.loads_within_hour(caller.subject)
    if loads >= limit:
        raise Exhausted(
            f"{caller.subject} started {loads} loads within an hour, {limit} are allowed",
            metadata={"limit": limit, "used": loads},
            retry_after=max(1.0, seconds) if loads else 3600.0,
        )


async def accept(
    registry: Registry, tx: Transaction, model: Model, order: Order, *, job_id: str = ""
) -> tuple[str, LoadPlan]:
    """Place a load, charge the ledger and queue its job; the model is `loading` when the transaction commits.

    The caller holds the model locked. A job that runs already is named by `job_id`, and only placed anew.

    Returns:
        Id of the job and the plan it follows.

    Raises:
        Unavailable: `NO_HOST`.
        Exhausted: `INSUFFICIENT_MEMORY`, or `QUOTA_EXCEEDED` when only the number of models is in the way.
    """
    hosts = await tx.placement.hosts(lock=True)
    if not any(host.answers_to(order.device) for host in hosts):
        raise no_host(order.device)
    order = replace(order, beside=await on_its_terms(tx, model.id, order.beside))
    plan = plan_order(order, hosts, registry.limits, model.id)
    job = job_id or new_id("job")
    await _charge(tx, model, order, plan, job)
    if not job_id:
        await tx.enqueue_load(job, model, order.payload(model.id), order.subject)
    return job, plan


def plan_order(order: Order, hosts: Sequence[Host], limits: Limits, model_id: str) -> LoadPlan:
    """A plan with a placement that fits.

    Raises:
        Exhausted: there is none.
    """
    plan = plan_load(
        order.need,
        hosts,
        device=order.device,
        fall_back=order.fall_back,
        limit=limits.max_resident_models,
        settled=limits.minimum_residency,
        seconds=order.seconds,
        copy_of=(model_id, order.quantization),
        beside=order.beside,
    )
    if plan.best is None:
        raise does_not_fit(plan, limits.max_resident_models)
    return plan


def does_not_fit(plan: LoadPlan, limit: int) -> Exhausted:
    """Why no placement fits, with both sides of the comparison."""
    roomiest = max(plan.placements, key=lambda placement: placement.obtainable_bytes)
    if roomiest.taken_by:
        return Exhausted(
            f"{roomiest.device} is not to be shared, and {roomiest.taken_by} may not leave",
            metadata={"model_id": roomiest.taken_by, "device": roomiest.device},
            retry_after=30.0,
        )
    if roomiest.obtainable_bytes >= roomiest.required_bytes:
        return Exhausted(
            f"{roomiest.device} holds {limit} models, and none of them may leave",
            metadata={"limit": limit, "device": roomiest.device},
            retry_after=30.0,
        )
    return insufficient_memory(roomiest.required_bytes, roomiest.obtainable_bytes, roomiest.device)


async def _charge(tx: Transaction, model: Model, order: Order, plan: LoadPlan, job: str) -> None:
    best = plan.best
    assert best is not None, "only a plan that fits is charged"
    for eviction in best.evictions:
        if eviction.lens_id:
            await tx.placement.lens_leaves(eviction.host_id, eviction.lens_id, job, parked=eviction.parked)
            continue
        if eviction.cause == "park_limit":  # nothing of the device's; the job's id alone says that it is leaving
            await tx.placement.change(eviction.model_id, eviction.host_id, job_id=job, cause=eviction.cause)
            continue
        state = "parking" if eviction.parked else "unloading"
        changes = {"state": state, "job_id": job, "cause": eviction.cause}
        await tx.placement.change(eviction.model_id, eviction.host_id, **changes)
    await tx.placement.put(
        model.id,
        best.host.host_id,
        state="loading",
        quantization=order.quantization,
        required_bytes=best.required_bytes,
        charge_bytes=max(0, best.required_bytes - best.own_freed_bytes),
        job_id=job,
        leases=0,
        active_lens_id=None,
        loaded_at=None,
    )
    await tx.models.start_load(
        job,
        model_id=model.id,
        host_id=best.host.host_id,
        quantization=order.quantization,
        cause=order.cause,
        created_by=order.subject,
        required_bytes=best.required_bytes,
    )
    columns: dict[str, Any] = {
        "wanted": True,
        "quantization": order.quantization,
        "estimated_memory_bytes": plan.need.total,
        "estimated_load_seconds": plan.estimated_seconds,
    }
    if model.status != "ready":  # a further copy of a ready model does not make it less ready
        columns |= {"status": "loading", "progress": 0.0, "error_code": None, "error_message": None}
        columns["fell_back_to_cpu"] = plan.fell_back
    await tx.models.update(model.id, **columns)
    await tx.emit(
        "model:loading",
        model.id,
        {
            "model_id": model.id,
            "status": "loading",
            "progress": 0.0,
            "message": f"Waiting to load on {best.device}",
            "task_id": job,
            "device": best.device,
            "fell_back_to_cpu": plan.fell_back,
            "evictions": [asdict(eviction) for eviction in best.evictions],
        },
    )
