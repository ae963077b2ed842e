"""Where a load goes and what has to leave first: pure decisions over the ledgers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.registry.domain import Eviction, Host, LoadPlan, Need, Placement, Residency

ASSUMED_BYTES_PER_SECOND = 200_000_000
"""Speed of a load before any was measured."""


def plan_load(
    need: Need, hosts: Sequence[Host], *, device: str, fall_back: bool, limit: int, seconds: float
) -> LoadPlan:
    """Every device in question, best first.

    Args:
        need: bytes.
        hosts: live hosts with their ledgers.
        device: only devices of this name; when empty any accelerator, and the CPU where there is none.
        fall_back: whether the CPU may be used when no other device has room.
        limit: most models on one device.
        seconds: expected duration.
    """
    wanted = [host for host in hosts if host.answers_to(device)]
    if not device and any(host.device != "cpu" for host in wanted):
        wanted = [host for host in wanted if host.device != "cpu"]
    placements = rank(place(need.total, host, limit) for host in wanted)
    if fall_back and not any(placement.fits for placement in placements):
        others = rank(place(need.total, h, limit) for h in hosts if h.device == "cpu" and h not in wanted)
        if any(placement.fits for placement in others):
            return LoadPlan(need, (*others, *placements), seconds, fell_back=True)
    return LoadPlan(need, tuple(placements), seconds)


def place(required: int, host: Host, limit: int) -> Placement:
    """Whether `required` bytes fit one device, and which idle models leave for that, least recently used first."""
    idle = sorted((r for r in host.residents if may_leave(r)), key=lambda r: r.last_used_at)
    held = [r for r in host.residents if r.state in ("loading", "resident")]
    obtainable = host.free_bytes + sum(r.bytes for r in idle)
    surplus = max(0, len(held) + 1 - limit)
    fits = obtainable >= required and surplus <= len(idle)
    chosen = _evict(required - host.free_bytes, surplus, idle) if fits else []
    return Placement(host, fits, host.free_bytes, obtainable, tuple(chosen))


def _evict(missing: int, surplus: int, idle: Sequence[Residency]) -> list[Eviction]:
    """The least recently used models whose leaving gives enough bytes and places; none that is not needed."""
    chosen: list[Residency] = []
    for residency in idle:
        if sum(r.bytes for r in chosen) >= missing and len(chosen) >= surplus:
            break
        chosen.append(residency)
    for residency in reversed(chosen[:-1]):  # a later, larger one may have made an earlier one needless
        rest = [r for r in chosen if r is not residency]
        if sum(r.bytes for r in rest) >= missing and len(rest) >= surplus:
            chosen = rest
    cause = "memory" if missing > 0 else "resident_limit"
    return [Eviction(r.model_id, r.bytes, cause) for r in chosen]


def may_leave(residency: Residency) -> bool:
    """Whether a model may be evicted: resident, not pinned, and nobody holds a lease."""
    return residency.state == "resident" and not residency.pinned and residency.leases == 0


def rank(placements: Iterable[Placement]) -> list[Placement]:
    """Best first: fits, without evictions, serves extraction, then the least that is left free."""
    return sorted(
        placements,
        key=lambda p: (
            not p.fits,
            len(p.evictions),
            "extraction" not in p.host.services,
            p.available_bytes,
            p.device,
        ),
    )
