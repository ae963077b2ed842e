"""Where a load goes and what has to leave first: pure decisions over the ledgers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from services.registry.domain import ALONE, Beside, Eviction, HeldLens, Host, LoadPlan, Need, Placement, Residency

ASSUMED_BYTES_PER_SECOND = 200_000_000
"""Speed of a load before any was measured."""


def plan_load(
    need: Need,
    hosts: Sequence[Host],
    *,
    device: str,
    fall_back: bool,
    limit: int,
    seconds: float,
    copy_of: tuple[str, str] = ("", ""),
    beside: Beside = ALONE,
    settled: float = 0.0,
) -> LoadPlan:
    """Every device in question, best first.

    Args:
        need: bytes.
        hosts: live hosts with their ledgers.
        device: only devices of this name; when empty any accelerator, and the CPU where there is none.
        fall_back: whether the CPU may be used when no other device has room.
        limit: most models on one device.
        seconds: expected duration.
        copy_of: model id and quantization: a device that has it parked moves it back.
        beside: what shall have room there, too.
        settled: seconds for which a model that has come to a device leaves it after all others.
    """
    wanted = [host for host in hosts if host.answers_to(device)]
    if not device and any(host.device != "cpu" for host in wanted):
        wanted = [host for host in wanted if host.device != "cpu"]

    def placed(host: Host) -> Placement:
        parked = next((r for r in host.residents if _is_parked(r) and (r.model_id, r.quantization) == copy_of), None)
        return place(need.total, host, limit, parked, beside, settled=settled, model_id=copy_of[0])

    placements = rank(placed(host) for host in wanted)
    if fall_back and not any(placement.fits for placement in placements):
        others = rank(placed(h) for h in hosts if h.device == "cpu" and h not in wanted)
        if any(placement.fits for placement in others):
            return LoadPlan(need, (*others, *placements), seconds, fell_back=True)
    return LoadPlan(need, tuple(placements), seconds)


def place(
    required: int,
    host: Host,
    limit: int,
    parked: Residency | None = None,
    beside: Beside = ALONE,
    *,
    settled: float = 0.0,
    model_id: str = "",
) -> Placement:
    """Whether a model fits one device, and which idle models leave for that, least recently used first.

    Where these are not enough, idle lenses of the models that stay leave, too.

    Args:
        required: bytes of a load.
        host: the device with its ledger.
        limit: most models on it.
        parked: the model where it is parked there; then its own bytes are what it needs.
        beside: what shall have room there, too.
        settled: seconds for which a model that has come there leaves after all others.
        model_id: what comes, as far as that is known.
    """
    required = required if parked is None else parked.bytes
    here = {r.model_id: r for r in host.residents}
    absent = [(name, size) for name, size in beside.sources if name not in here or here[name].state != "resident"]
    more = sum(here[name].bytes if name in here and _is_parked(here[name]) else size for name, size in absent)
    more += sum(size for name, size in beside.lenses if parked is None or name not in parked.lens_ids)
    keep = {name for name, _ in beside.sources}
    idle = in_order_of_leaving(host.residents, keep, settled, spares=beside.spares)
    forced = _forced(host.residents, keep, model_id, alone=beside.alone)
    held = [r for r in host.residents if r.state in ("loading", "resident")]
    staying = [r for r in host.residents if r not in idle and beside.spares != "all"]
    lenses = idle_lenses(staying, {name for name, _ in beside.lenses})
    obtainable = host.free_bytes + sum(r.bytes for r in idle) + sum(lens.bytes for _, lens in lenses)
    surplus = max(0, len(held) + 1 + len(absent) - limit)
    taken_by = next((r.model_id for r in forced if r not in idle), "")
    if beside.alone and host.reserved_bytes:
        taken_by = taken_by or "a reservation"
    fits = obtainable >= required + more and surplus <= len(idle) and not taken_by
    missing = required + more - host.free_bytes
    chosen = _chosen(missing, surplus, idle, forced) if fits else []
    cause = "memory" if missing > 0 else "resident_limit"
    alone = _fewest(missing - sum(r.bytes for r in chosen), lenses) if fits else []
    causes = {r.model_id: "exclusive" if r in forced else cause for r in chosen}
    evictions = (*_evictions(chosen, causes, host, parked), *_of_lenses(alone))
    return Placement(
        host,
        fits,
        host.free_bytes,
        obtainable,
        evictions,
        required,
        restores=parked is not None,
        shared=len(beside.sources) - len(absent),
        taken_by=taken_by,
    )


def place_lens(size: int, host: Host, keep: Collection[str], lens_id: str) -> Placement:
    """Whether a lens fits beside its base, and what leaves for it.

    Idle lenses leave, least recently used first, and when all of them are not enough idle models with theirs.

    Args:
        size: its bytes.
        host: the device with its ledger; what the lens holds there already is not counted.
        keep: models that stay: its base, and what it reads.
        lens_id: the lens.
    """
    mine = sum(lens.bytes for r in host.residents for lens in r.lenses if lens.lens_id == lens_id)
    free = host.free_bytes + mine
    models = in_order_of_leaving(host.residents, keep)
    lenses = idle_lenses(host.residents, {lens_id})
    obtainable = free + sum(r.bytes for r in models)
    obtainable += sum(lens.bytes for r, lens in lenses if r not in models)
    for count in range(len(models) + 1):
        gone = models[:count]
        rest = [pair for pair in lenses if pair[0] not in gone]
        missing = size - free - sum(r.bytes for r in gone)
        if missing <= sum(lens.bytes for _, lens in rest):
            evictions = (
                *_evictions(gone, dict.fromkeys((r.model_id for r in gone), "memory"), host, None),
                *_of_lenses(_fewest(missing, rest)),
            )
            return Placement(host, True, free, obtainable, evictions, size)
    return Placement(host, False, free, obtainable, (), size)


def idle_lenses(residents: Sequence[Residency], keep: Collection[str]) -> list[tuple[Residency, HeldLens]]:
    """Lenses on the device that nobody uses, each with its base, least recently used first."""
    found = [
        (r, lens)
        for r in residents
        if r.state == "resident"
        for lens in r.lenses
        if lens.state == "here" and not lens.leases and lens.lens_id not in keep
    ]
    return sorted(found, key=lambda pair: pair[1].last_used_at)


def _fewest(missing: int, lenses: Sequence[tuple[Residency, HeldLens]]) -> list[tuple[Residency, HeldLens]]:
    """The least recently used lenses whose leaving gives enough bytes; none that is not needed."""
    chosen: list[tuple[Residency, HeldLens]] = []
    for pair in lenses:
        if missing <= sum(lens.bytes for _, lens in chosen):
            break
        if pair[1].bytes:
            chosen.append(pair)
    for pair in reversed(chosen[:-1]):  # a later, larger one may have made an earlier one needless
        if sum(lens.bytes for _, lens in chosen) - pair[1].bytes >= missing:
            chosen.remove(pair)
    return chosen


def _of_lenses(lenses: Sequence[tuple[Residency, HeldLens]]) -> tuple[Eviction, ...]:
    return tuple(Eviction(r.model_id, lens.bytes, "memory", lens_id=lens.lens_id) for r, lens in lenses)


def in_order_of_leaving(
    residents: Sequence[Residency], keep: Collection[str], settled: float = 0.0, spares: str = ""
) -> list[Residency]:
    """Who may leave, least recently used first, a source of activations after the models there that read it.

    Those that came within the last `settled` seconds leave after the others; `spares` says who stays, see `Beside`.
    """
    young = {r.model_id for r in residents if r.resident_seconds is not None and r.resident_seconds < settled}
    stay = {*keep, *({"young": young, "all": {r.model_id for r in residents}}.get(spares, ()))}
    may = [r for r in residents if may_leave(r) and r.model_id not in stay]
    waiting = sorted(may, key=lambda r: (r.model_id in young, r.last_used_at))
    staying = {r.model_id for r in residents if r.state in ("loading", "resident", "unloading", "parking")}
    order: list[Residency] = []
    while (free := next((r for r in waiting if not staying & set(r.needed_by)), None)) is not None:
        waiting.remove(free)
        staying.remove(free.model_id)
        order.append(free)
    return order


def _forced(residents: Sequence[Residency], keep: Collection[str], model_id: str, *, alone: bool) -> list[Residency]:
    """Who has to leave whatever the bytes: all for a model that comes alone, and one that wants no other beside it."""
    there = [r for r in residents if r.state in ("loading", "resident") and r.model_id not in keep]
    return [r for r in there if alone or (r.exclusive and model_id not in r.reads)]


def _chosen(missing: int, surplus: int, idle: Sequence[Residency], forced: Sequence[Residency]) -> list[Residency]:
    """Who has to leave, and the least recently used models whose leaving gives enough bytes and places beside that."""
    chosen = [residency for residency in idle if residency in forced]
    for residency in idle:
        if sum(r.bytes for r in chosen) >= missing and len(chosen) >= surplus:
            break
        if residency not in chosen:
            chosen.append(residency)
    for residency in reversed(chosen[:-1]):  # a later, larger one may have made an earlier one needless
        if residency in forced:
            continue
        rest = [r for r in chosen if r is not residency]
        if any(residency.model_id in r.needed_by for r in rest):
            continue
        if sum(r.bytes for r in rest) >= missing and len(rest) >= surplus:
            chosen = rest
    return chosen


def _evictions(
    chosen: Sequence[Residency], causes: Mapping[str, str], host: Host, returning: Residency | None
) -> tuple[Eviction, ...]:
    """Who leaves the device is parked while host memory has room; there, too, the least recently used give way."""
    parked = [r for r in host.residents if _is_parked(r) and r is not returning]
    room = host.park_bytes - sum(r.bytes for r in host.residents if r.moving and r.state in ("parking", "parked"))
    kept = set()
    for residency in sorted((*parked, *chosen), key=lambda r: r.last_used_at, reverse=True):
        if residency.bytes <= room:
            room -= residency.bytes
            kept.add(residency.model_id)
    dropped = [Eviction(r.model_id, r.bytes, "park_limit") for r in parked if chosen and r.model_id not in kept]
    return (*dropped, *(Eviction(r.model_id, r.bytes, causes[r.model_id], parked=r.model_id in kept) for r in chosen))


def _is_parked(residency: Residency) -> bool:
    return residency.state == "parked" and not residency.moving


def may_leave(residency: Residency) -> bool:
    """Whether a model may be evicted: resident, not pinned, and nobody holds a lease."""
    return residency.state == "resident" and not residency.pinned and residency.leases == 0


def rank(placements: Iterable[Placement]) -> list[Placement]:
    """Best first: fits, fewest evictions, has it parked, has most that it reads, serves extraction, least left free."""
    return sorted(
        placements,
        key=lambda p: (
            not p.fits,
            len(p.evictions),
            not p.restores,
            -p.shared,
            "extraction" not in p.host.services,
            p.available_bytes,
            p.device,
        ),
    )
