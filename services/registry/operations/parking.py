"""Preloads into host memory, from where a switch takes a group without reading a file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

from services.kit.errors import Conflict, Failed, LensmeshError, Unsupported
from services.registry.domain import Host, Lens, Model, Residency
from services.registry.failures import insufficient_memory
from services.registry.job_ports import LoadLease
from services.registry.operations.estimating import estimate_model
from services.registry.operations.lenses import artifact_of
from services.registry.operations.registry import Registry
from services.registry.operations.running import STEP_PERCENT, adopt
from services.registry.ports import LoadStep, Transaction


async def require_parking(registry: Registry) -> None:
    """Refuse what no device of the mesh can do.

    Raises:
        Unsupported: none parks in host memory.
    """
    async with registry.store.transaction() as tx:
        if not any(host.park_bytes for host in await tx.placement.hosts()):
            raise Unsupported(
                "No device here parks models in host memory; where both share one, parking means the disk"
            )


async def park_base(
    registry: Registry, lease: LoadLease, model_id: str, tell: Callable[[float], Awaitable[None]]
) -> Residency:
    """A copy of a base on a device or parked, the latter after loading one into host memory that has room.

    Args:
        registry: the registry.
        lease: the preload's.
        model_id: the base.
        tell: takes the percentage of a load, at least every 5.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`: no host memory has room left; nothing leaves it for a preload.
        LensmeshError: the load failed, for the reason it gives; nothing is left of it.
    """
    while True:
        plan = await estimate_model(registry, model_id, None, "")
        size = plan.need.weights + plan.need.quantization_state
        async with lease.commit() as tx:
            model = await tx.models.get(model_id, lock=True)
            copies = await tx.placement.of_model(model_id)
            there = next((c for c in copies if c.state in ("resident", "parked") and not c.moving), None)
            if there is not None:
                return there
            mine = next((c.host_id for c in copies if c.job_id == lease.id), None)
            busy = mine is None and any(copy.moving for copy in copies)
            if not busy:
                names = [mine] if mine else [placement.host.host_id for placement in plan.placements]
                host = await _place(tx, lease.id, model, size, names)
        if busy:
            await lease.unless_stopped(registry.endings.wait(model_id, 0.2))
            continue
        try:
            last = await _load(registry, lease, model, host, tell)
        except LensmeshError:
            async with lease.commit() as tx:
                await forget(tx, lease.id)
            raise
        async with lease.commit() as tx:
            if last.model is not None and any(
                copy.host_id == host.host_id for copy in await tx.placement.of_job(lease.id)
            ):
                await adopt(tx, host, last.model)
                await tx.placement.change(model_id, host.host_id, job_id=None)


async def _place(tx: Transaction, job_id: str, model: Model, size: int, names: list[str]) -> Host:
    """The first of these hosts whose memory has room; it is the job's from now on."""
    room = 0
    live = {host.host_id: host for host in await tx.placement.hosts(lock=True)}
    for host in (live[name] for name in names if name in live):
        mine = any(r.job_id == job_id and r.model_id == model.id for r in host.residents)
        room = max(room, park_room(host) + (size if mine else 0))
        if mine or park_room(host) >= size:
            facts = {"state": "parked", "quantization": model.quantization, "job_id": job_id}
            more = {"required_bytes": size, "charge_bytes": size, "leases": 0, "active_lens_id": None}
            await tx.placement.put(model.id, host.host_id, **facts, **more)
            return host
    raise insufficient_memory(size, room, "Host memory")


async def _load(
    registry: Registry, lease: LoadLease, model: Model, host: Host, tell: Callable[[float], Awaitable[None]]
) -> LoadStep:
    async with registry.store.transaction() as tx:
        known = (model.id, host.host_id, model.quantization, host.incarnation)
        expected = await tx.placement.fingerprint(*known)
    steps = registry.hosts.load(
        host.address,
        model.id,
        model.files,
        model.quantization,
        digest=model.digest or "",
        fingerprint=expected,
        parked=True,
    )
    told = 0.0
    async with aclosing(steps):
        while (step := await lease.unless_stopped(anext(steps, None))) is not None:
            if step.model is not None:
                return step
            if step.percent >= told + STEP_PERCENT:
                told = step.percent - step.percent % STEP_PERCENT
                await tell(step.percent)
    raise Failed("The host ended the load without a result", reason="MODEL_LOAD_FAILED")


async def park_lens(registry: Registry, lens: Lens, copy: Residency) -> int:
    """Bring a lens to a parked copy of its base; its bytes.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`: host memory has no room left.
        Unsupported: it reads the activations of another model, with which it comes when its group is switched to.
        LensmeshError: the host refused it; it is nowhere then.
    """
    if lens.activation_source_model_id:
        raise Unsupported("A lens that reads another model comes with that one, when its group is switched to")
    async with registry.store.transaction() as tx:
        host = await tx.placement.lock_host(copy.host_id)
        here = next((r for r in host.residents if r.model_id == copy.model_id), None)
        if here is None or here.state != "parked" or here.moving:
            raise Conflict(f"Model {copy.model_id} is not parked any more", metadata={"model_id": copy.model_id})
        for held in here.lenses:
            if held.lens_id == lens.id:
                return held.bytes
        if lens.size_bytes > park_room(host):
            raise insufficient_memory(lens.size_bytes, park_room(host), "Host memory")
        await tx.groups.place_lens(lens.id, copy.model_id, copy.host_id, lens.size_bytes, "coming")
    what = (lens.id, lens.kind, artifact_of(lens, copy))
    try:
        size = await registry.hosts.attach_lens(copy.address, copy.model_id, *what, parked=True)
    except BaseException:
        async with registry.store.transaction() as tx:
            await tx.groups.displace_lens(lens.id, copy.host_id)
        raise
    async with registry.store.transaction() as tx:
        await tx.groups.place_lens(lens.id, copy.model_id, copy.host_id, size)
    return size


def park_room(host: Host) -> int:
    """Bytes of host memory that nobody parks in, or is about to."""
    models = sum(r.bytes for r in host.residents if r.state == "parking")
    lenses = sum(lens.bytes for r in host.residents for lens in r.lenses if lens.state == "parking")
    return host.park_bytes - host.parked_bytes - models - lenses


async def forget(tx: Transaction, job_id: str) -> None:
    """What a preload was bringing to host memory does not come."""
    for copy in await tx.placement.of_job(job_id):
        await tx.placement.remove(copy.model_id, copy.host_id)
