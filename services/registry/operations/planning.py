"""Where a load goes and what has to leave first: pure decisions over the ledgers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import merge

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
        limit: most models in one process.
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


@dataclass(frozen=True, slots=True)
class _Lack:
    """Bytes that have to come back before something fits: of its process's budget, and of the whole device."""

    host_id: str
    own: int
    device: int

    @classmethod
    def of(cls, required: int, host: Host) -> _Lack:
        return cls(host.host_id, required - host.own_free_bytes, required - host.device_free_bytes)

    def after(self, gone: Iterable[Residency], lenses: Iterable[tuple[Residency, HeldLens]] = ()) -> _Lack:
        """What is lacking still once these have left."""
        back = [(r.host_id, r.bytes) for r in gone] + [(r.host_id, lens.bytes) for r, lens in lenses]
        own = sum(size for host_id, size in back if host_id == self.host_id)
        return _Lack(self.host_id, self.own - own, self.device - sum(size for _, size in back))

    def helped_by(self, residency: Residency) -> bool:
        """Whether its leaving makes a difference: what other processes hold is no part of this one's budget."""
        return self.device > 0 or residency.host_id == self.host_id

    @property
    def most(self) -> int:
        return max(self.own, self.device)


def place(
    required: int,
    host: Host,
    limit: int,
    parked: Residency | None = None,
    beside: Beside = ALONE,
    *,
    settled: float = 0.0,
    model_id: str = "",
    stays: Collection[str] = (),
) -> Placement:
    """Whether a model fits one device, and which idle models leave for that, least recently used first.

    Models in other processes of the device leave like its own. Where all of these are not enough, idle lenses of the
    models that stay leave, too.

    Args:
        required: bytes of a load.
        host: the device with its ledger.
        limit: most models in its process.
        parked: the model where it is parked there; then its own bytes are what it needs.
        beside: what shall have room there, too.
        settled: seconds for which a model that has come there leaves after all others.
        model_id: what comes, as far as that is known.
        stays: models that stay, whichever process of the device they are in.
    """
    required = required if parked is None else parked.bytes
    here = {r.model_id: r for r in host.residents}
    absent = [(name, size) for name, size in beside.sources if name not in here or here[name].state != "resident"]
    more = sum(here[name].bytes if name in here and _is_parked(here[name]) else size for name, size in absent)
    more += sum(size for name, size in beside.lenses if parked is None or name not in parked.lens_ids)
    keep = {name for name, _ in beside.sources}
    idle = idle_on_device(host, keep, settled, spares=beside.spares, stays=stays)
    forced = [r for r in _forced(host, keep, model_id, alone=beside.alone) if r.model_id not in stays]
    held = [r for r in host.residents if r.state in ("loading", "resident")]
    staying = [r for r in host.shared_residents if r not in idle and beside.spares != "all"]
    lenses = idle_lenses(staying, {name for name, _ in beside.lenses})
    lack = _Lack.of(required + more, host)
    surplus = max(0, len(held) + 1 + len(absent) - limit)
    taken_by = next((r.model_id for r in forced if r not in idle), "")
    if beside.alone and any(process.reserved_bytes for process in (host, *host.siblings)):
        taken_by = taken_by or "a reservation"
    least = lack.after(idle, lenses)
    fits = least.most <= 0 and surplus <= sum(r.host_id == host.host_id for r in idle) and not taken_by
    chosen = _chosen(lack, surplus, idle, forced) if fits else []
    cause = "memory" if lack.most > 0 else "resident_limit"
    alone = _fewest(lack.after(chosen), lenses) if fits else []
    causes = [(r, "exclusive" if r in forced else cause) for r in chosen]
    evictions = _evictions(causes, alone, host, parked)
    return Placement(
        host,
        fits,
        host.free_bytes,
        required + more - least.most,
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
    there = [lens for r in host.residents for lens in r.lenses if lens.lens_id == lens_id]
    returning = next((lens for lens in there if lens.stowed), None)
    mine = sum(lens.bytes for lens in there if not lens.stowed)
    lack = _Lack.of(size - mine, host)
    models = idle_on_device(host, keep)
    lenses = idle_lenses(host.shared_residents, {lens_id})
    least = lack.after(models, [pair for pair in lenses if pair[0] not in models])
    available, obtainable = host.free_bytes + mine, size - least.most
    gone: list[Residency] = []
    for model in (None, *models):
        if model is not None and lack.after(gone).helped_by(model):
            gone.append(model)
        rest = [pair for pair in lenses if pair[0] not in gone]
        if lack.after(gone, rest).most <= 0:
            causes = [(r, "memory") for r in gone]
            evictions = _evictions(causes, _fewest(lack.after(gone), rest), host, returning)
            restores = returning is not None
            return Placement(host, True, available, obtainable, evictions, size, restores=restores)
    return Placement(host, False, available, obtainable, (), size)


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


def _fewest(lack: _Lack, lenses: Sequence[tuple[Residency, HeldLens]]) -> list[tuple[Residency, HeldLens]]:
    """The least recently used lenses whose leaving gives enough bytes; none that is not needed."""
    chosen: list[tuple[Residency, HeldLens]] = []
    for pair in lenses:
        lacking = lack.after((), chosen)
        if lacking.most <= 0:
            break
        if pair[1].bytes and lacking.helped_by(pair[0]):
            chosen.append(pair)
    for pair in reversed(chosen[:-1]):  # a later, larger one may have made an earlier one needless
        rest = [other for other in chosen if other is not pair]
        if lack.after((), rest).most <= 0:
            chosen = rest
    return chosen


def idle_on_device(
    host: Host, keep: Collection[str] = (), settled: float = 0.0, spares: str = "", stays: Collection[str] = ()
) -> list[Residency]:
    """Who may leave a device, of all its processes, in order; `keep` is about models in the process of `host`."""
    own = in_order_of_leaving(host.residents, {*keep, *stays}, settled, spares)
    others = [in_order_of_leaving(process.residents, stays, settled, spares) for process in host.siblings]
    return list(merge(own, *others, key=lambda r: (_is_young(r, settled), r.last_used_at)))


def in_order_of_leaving(
    residents: Sequence[Residency], keep: Collection[str], settled: float = 0.0, spares: str = ""
) -> list[Residency]:
    """Who may leave, least recently used first, a source of activations after the models there that read it.

    Those that came within the last `settled` seconds leave after the others; `spares` says who stays, see `Beside`.
    """
    young = {r.model_id for r in residents if _is_young(r, settled)}
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


def _is_young(residency: Residency, settled: float) -> bool:
    return residency.resident_seconds is not None and residency.resident_seconds < settled


def _forced(host: Host, keep: Collection[str], model_id: str, *, alone: bool) -> list[Residency]:
    """Who has to leave whatever the bytes: all for a model that comes alone, and one that wants no other beside it."""
    own = [r for r in host.residents if r.model_id not in keep and (alone or (r.exclusive and model_id not in r.reads))]
    others = [r for process in host.siblings for r in process.residents if alone or r.exclusive]
    found = (*own, *(r for r in others if r.model_id != model_id))  # another copy of what comes is nobody else
    return [r for r in found if r.state in ("loading", "resident")]


def _chosen(lack: _Lack, surplus: int, idle: Sequence[Residency], forced: Sequence[Residency]) -> list[Residency]:
    """Who has to leave, and the least recently used models whose leaving gives enough bytes and places beside that."""

    def enough(gone: Sequence[Residency]) -> bool:
        return lack.after(gone).most <= 0 and sum(r.host_id == lack.host_id for r in gone) >= surplus

    chosen = [residency for residency in idle if residency in forced]
    for residency in idle:
        if enough(chosen):
            break
        if residency not in chosen and lack.after(chosen).helped_by(residency):
            chosen.append(residency)
    for residency in reversed(chosen[:-1]):  # a later, larger one may have made an earlier one needless
        if residency in forced:
            continue
        rest = [r for r in chosen if r is not residency]
        if any(residency.model_id in r.needed_by for r in rest if r.host_id == residency.host_id):
            continue
        if enough(rest):
            chosen = rest
    return chosen


_Part = tuple[Residency, HeldLens | None]
"""A model with its lenses, or one of its lenses alone."""


def _evictions(
    models: Sequence[tuple[Residency, str]],
    lenses: Sequence[tuple[Residency, HeldLens]],
    host: Host,
    returning: Residency | HeldLens | None,
) -> tuple[Eviction, ...]:
    """Who leaves, and why; each process parks its own while its host memory has room.

    There, too, the least recently used give way, lenses that are parked alone before models. A lens that reads another
    model is not parked without it.
    """
    leaving: list[_Part] = [*((r, None) for r, _ in models), *lenses]
    dropped: list[_Part] = []
    kept: list[_Part] = []
    for process in (host, *host.siblings):
        own = [(r, lens) for r, lens in leaving if r.host_id == process.host_id and not (lens and lens.source)]
        if not own:
            continue
        there = list(_in_host_memory(process))
        # What is to come back takes its room until those that leave for it have left.
        parked = [(r, lens) for r, lens in there if _is_settled(r, lens) and (lens or r) is not returning]
        room = process.park_bytes - sum((lens or r).bytes for r, lens in there if (r, lens) not in parked)
        for r, lens in sorted((*parked, *own), key=_staying, reverse=True):
            if (lens or r).bytes <= room:
                room -= (lens or r).bytes
                kept.append((r, lens))
        gone = [part for part in parked if part not in kept]
        dropped += [(r, lens) for r, lens in gone if lens is None or (r, None) not in gone]
    return (
        *(_eviction(r, lens, "park_limit") for r, lens in dropped),
        *(_eviction(r, None, cause, parked=(r, None) in kept) for r, cause in models),
        *(_eviction(r, lens, "memory", parked=(r, lens) in kept) for r, lens in lenses),
    )


def _eviction(residency: Residency, lens: HeldLens | None, cause: str, *, parked: bool = False) -> Eviction:
    lens_id = lens.lens_id if lens is not None else ""
    return Eviction(residency.model_id, residency.host_id, (lens or residency).bytes, cause, parked, lens_id)


def _in_host_memory(process: Host) -> Iterator[_Part]:
    """What is parked there, and what is about to be."""
    for residency in process.residents:
        if residency.state in ("parking", "parked"):
            yield residency, None
        for lens in residency.lenses:
            if lens.stowed or lens.state == "parking":
                yield residency, lens


def _is_settled(residency: Residency, lens: HeldLens | None) -> bool:
    """Whether it is parked, and neither comes nor goes."""
    return not residency.moving and lens.state == "parked" if lens is not None else _is_parked(residency)


def _staying(part: _Part) -> tuple[bool, datetime]:
    residency, lens = part
    return lens is None, (lens or residency).last_used_at


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
