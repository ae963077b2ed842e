"""Placement decisions over ledgers, without a database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.errors import Exhausted
from services.registry.domain import Beside, HeldLens, Host, Need, Residency
from services.registry.operations.admission import does_not_fit
from services.registry.operations.planning import may_leave, place, place_lens, plan_load

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def resident(model_id: str, size: int, age: int, **changes: Any) -> Residency:
    facts: dict[str, Any] = {
        "host_id": "h",
        "state": "resident",
        "quantization": "none",
        "required_bytes": size,
        "charge_bytes": size,
        "job_id": None,
        "leases": 0,
        "active_lens_id": None,
        "loaded_at": NOW,
        "last_used_at": NOW - timedelta(seconds=age),
    }
    return Residency(model_id, **{**facts, **changes})


def held(lens_id: str, size: int, age: int = 0, **changes: Any) -> HeldLens:
    return HeldLens(lens_id, size, NOW - timedelta(seconds=age), **changes)


def host(name: str = "h", budget: int = 100, *residents: Residency, **changes: Any) -> Host:
    residents = tuple(replace(each, host_id=name) for each in residents)
    facts: dict[str, Any] = {
        "incarnation": "i",
        "address": "a",
        "device": "cpu",
        "kind": "fake",
        "total_bytes": budget,
        "budget_bytes": budget,
        "measured_bytes": 0,
        "services": ("extraction",),
        "temperature_celsius": None,
        "utilization_ratio": None,
        "lost": False,
        "heartbeat_at": NOW,
        "used_bytes": sum(r.bytes for r in residents),
        "residents": residents,
    }
    return Host(name, **{**facts, **changes})


def evicted(required: int, on: Host, limit: int = 10) -> list[str] | None:
    placement = place(required, on, limit)
    return [eviction.model_id for eviction in placement.evictions] if placement.fits else None


def plan(size: int, *hosts: Host, device: str = "", fall_back: bool = False) -> Any:
    return plan_load(Need(size, 0, 0, 0), hosts, device=device, fall_back=fall_back, limit=3, seconds=1.0)


def test_nothing_leaves_while_there_is_room() -> None:
    assert evicted(40, host("h", 100, resident("a", 60, 9))) == []


def test_the_least_recently_used_leaves_first() -> None:
    assert evicted(50, host("h", 100, resident("new", 50, 1), resident("old", 50, 9))) == ["old"]


def test_a_model_leaves_only_if_it_has_to() -> None:
    """The oldest one is small; the next is enough by itself."""
    assert evicted(60, host("h", 100, resident("big", 80, 5), resident("small", 10, 9))) == ["big"]


@pytest.mark.parametrize("change", [{"leases": 1}, {"pinned": True}, {"state": "loading"}, {"state": "unloading"}])
def test_models_in_use_pinned_or_on_the_move_stay(change: dict[str, Any]) -> None:
    kept = resident("a", 60, 9, **change)
    assert not may_leave(kept)
    assert evicted(50, host("h", 100, kept)) is None


def test_lens_bytes_come_back_with_their_base() -> None:
    assert evicted(90, host("h", 100, resident("a", 50, 9, lenses=(held("l", 45),)))) == ["a"]


def test_reserved_bytes_are_nobodys() -> None:
    assert evicted(50, host("h", 100, reserved_bytes=60)) is None


@pytest.mark.parametrize(("used", "pressed"), [(None, False), (900, False), (901, True)])
def test_above_90_per_cent_a_device_is_nearly_full_whatever_its_budget_is(used: int | None, pressed: bool) -> None:
    assert host(budget=500, total_bytes=1000, device_used_bytes=used).pressed is pressed


def test_the_number_of_models_counts_too() -> None:
    full = host("h", 1000, *(resident(name, 10, age) for age, name in enumerate("cba")))
    assert evicted(10, full, limit=3) == ["a"]
    assert evicted(10, full, limit=4) == []
    leased = host("h", 1000, *(resident(name, 10, 1, leases=1) for name in "abc"))
    with pytest.raises(Exhausted) as refusal:
        raise does_not_fit(plan(10, leased), 3)
    assert refusal.value.reason == "QUOTA_EXCEEDED"


def test_the_refusal_compares_what_is_needed_with_what_could_be_had() -> None:
    crowded = host("h", 100, resident("a", 60, 1), resident("b", 30, 1, leases=1))
    with pytest.raises(Exhausted) as refusal:
        raise does_not_fit(plan(80, crowded), 3)
    assert refusal.value.reason == "INSUFFICIENT_MEMORY"
    assert refusal.value.metadata["required_memory_gb"] == pytest.approx(80e-9, abs=1e-6)
    assert crowded.free_bytes == 10
    assert place(80, crowded, 3).obtainable_bytes == 70


def test_best_fit_prefers_no_eviction_then_extraction_then_the_tightest() -> None:
    loose, tight = host("loose", 500), host("tight", 120)
    other = host("other", 100, services=("training",))
    crowded = host("crowded", 100, resident("a", 50, 1))
    assert [p.device for p in plan(90, loose, other, tight, crowded).placements] == [
        "tight/cpu",
        "loose/cpu",
        "other/cpu",
        "crowded/cpu",
    ]


def test_the_cpu_is_taken_only_where_there_is_nothing_else_or_it_is_asked_for() -> None:
    cpu, gpu = host("c", 1000), host("g", 50, device="cuda:0")
    assert plan(90, cpu).best.device == "c/cpu"
    assert plan(90, cpu, gpu).best is None
    assert plan(40, cpu, gpu).best.device == "g/cuda:0"
    assert plan(90, cpu, gpu, device="cpu").best.device == "c/cpu"
    fallen = plan(90, cpu, gpu, fall_back=True)
    assert (fallen.best.device, fallen.fell_back) == ("c/cpu", True)
    assert not plan(40, cpu, gpu, fall_back=True).fell_back


@pytest.mark.parametrize("name", ["cuda:0", "g", "g/cuda:0", ""])
def test_a_device_answers_to_its_names(name: str) -> None:
    assert host("g", 10, device="cuda:0").answers_to(name)
    assert not host("g", 10, device="cuda:1").answers_to("cuda:0")


def test_a_measured_load_corrects_the_weights_only() -> None:
    need = Need(weights=100, quantization_state=20, activations=30, overhead=4)
    assert need.corrected(90) == Need(70, 20, 30, 4)
    assert need.corrected(None) is need


@given(
    st.integers(1, 200),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5), st.booleans()), max_size=5),
)
def test_an_eviction_is_always_enough_and_never_too_much(
    required: int, limit: int, models: list[tuple[int, int, bool]]
) -> None:
    residents = [resident(f"m{n}", size, age, leases=int(used)) for n, (size, age, used) in enumerate(models)]
    on = host("h", 200, *residents, used_bytes=sum(r.bytes for r in residents))
    placement = place(required, on, limit)
    leaving = {eviction.model_id for eviction in placement.evictions}
    idle = [r for r in residents if may_leave(r)]
    could = on.free_bytes + sum(r.bytes for r in idle) >= required and len(residents) + 1 - len(idle) <= limit
    assert placement.fits == could
    if placement.fits:
        assert leaving <= {r.model_id for r in idle}

        def enough(gone: set[str]) -> bool:
            freed = sum(r.bytes for r in residents if r.model_id in gone)
            return on.free_bytes + freed >= required and len(residents) + 1 - len(gone) <= limit

        assert enough(leaving)
        assert not any(enough(leaving - {model_id}) for model_id in leaving)


def parks(required: int, on: Host, limit: int = 10) -> list[tuple[str, str, bool]]:
    return [(e.model_id, e.cause, e.parked) for e in place(required, on, limit).evictions]


def test_who_leaves_is_parked_while_host_memory_has_room() -> None:
    on = host("h", 100, resident("old", 50, 9), resident("new", 50, 1), park_bytes=60)
    assert parks(50, on) == [("old", "memory", True)]
    assert parks(100, on) == [("old", "memory", False), ("new", "memory", True)]


def test_the_parked_one_that_was_used_longest_ago_gives_way() -> None:
    parked = resident("stale", 40, 99, state="parked")
    on = host("h", 100, resident("old", 60, 9), parked, park_bytes=90, used_bytes=60)
    assert parks(80, on) == [("stale", "park_limit", False), ("old", "memory", True)]
    assert parks(30, on) == []


def test_what_a_job_drops_or_parks_still_takes_its_room() -> None:
    leaving = resident("leaving", 40, 99, state="parked", job_id="job_1")
    arriving = resident("arriving", 20, 1, state="parking", job_id="job_1")
    on = host("h", 100, resident("old", 60, 9), leaving, arriving, park_bytes=100, used_bytes=80)
    assert parks(70, on) == [("old", "memory", False)]


def test_a_parked_model_needs_its_own_bytes_and_comes_back_where_it_is() -> None:
    parked = resident("m", 40, 5, state="parked")
    near, far = host("near", 100, parked, used_bytes=0), host("far", 90)
    need = Need(80, 0, 0, 0)
    hosts = [far, near]
    again = plan_load(need, hosts, device="", fall_back=False, limit=3, seconds=1.0, copy_of=("m", "none"))
    assert (again.best.host, again.best.restores, again.best.required_bytes) == (near, True, 40)
    anew = plan_load(need, hosts, device="", fall_back=False, limit=3, seconds=1.0, copy_of=("m", "int8"))
    assert (anew.best.host, anew.best.restores, anew.best.required_bytes) == (far, False, 80)


def test_a_source_leaves_only_after_the_models_that_read_it() -> None:
    base = resident("base", 40, 1)
    source = resident("source", 50, 9, needed_by=("base",))
    on = host("h", 100, base, source, resident("idle", 10, 5))
    assert evicted(10, on) == ["idle"]
    assert evicted(50, on) == ["idle", "base"]
    assert evicted(90, on) == ["base", "source"]
    assert evicted(90, host("h", 100, resident("base", 40, 1, leases=1), source, resident("idle", 10, 5))) is None
    parked = resident("base", 40, 1, state="parked")
    assert evicted(90, host("h", 100, parked, source, used_bytes=50, park_bytes=90)) == ["source"]


def beside(**sources: int) -> Beside:
    return Beside(sources=tuple(sources.items()))


def test_room_for_the_lenses_is_made_unless_they_are_parked_with_their_base() -> None:
    lenses = Beside(lenses=(("l1", 20), ("l2", 20)))
    on = host("h", 100, resident("idle", 40, 5))
    assert [e.model_id for e in place(50, on, 10, None, lenses).evictions] == ["idle"]
    assert place(20, on, 10, None, lenses).evictions == ()
    parked = resident("m", 50, 5, state="parked", lenses=(held("l1", 20),))
    on = host("h", 100, resident("idle", 10, 5), parked, used_bytes=10)
    assert place(80, on, 10, parked, lenses).evictions == ()


def test_room_for_the_sources_is_made_with_the_room_for_their_base() -> None:
    on = host("h", 100, resident("idle", 30, 5), resident("here", 30, 9))
    assert [e.model_id for e in place(50, on, 10, None, beside(here=30, absent=20)).evictions] == ["idle"]
    assert not place(50, on, 10, None, beside(here=30, absent=21)).fits
    parked = host("h", 100, resident("s", 20, 5, state="parked"), used_bytes=0)
    assert place(80, parked, 10, None, beside(s=90)).fits
    assert not place(50, on, 2, None, beside(here=30, absent=0)).fits


def leaving(size: int, on: Host, keep: tuple[str, ...] = ("base",)) -> list[tuple[str, str]] | None:
    placement = place_lens(size, on, keep, "new")
    assert sum(e.bytes for e in placement.evictions) >= (size - placement.available_bytes if placement.fits else 0)
    return [(e.model_id, e.lens_id) for e in placement.evictions] if placement.fits else None


def test_idle_lenses_of_any_base_leave_for_a_lens_before_models_do_and_its_base_never() -> None:
    lenses = (
        held("used", 10, 99, leases=1),
        held("old", 10, 9),
        held("young", 10, 1),
        held("going", 10, 50, state="leaving"),
    )
    base = resident("base", 30, 99, lenses=lenses)
    other = resident("other", 10, 50, lenses=(held("older", 10, 20),))
    on = host("h", 100, base, other, resident("small", 10, 40), used_bytes=100)
    assert leaving(5, on) == [("base" if lens == "old" else "other", lens) for lens in ("older",)]
    assert leaving(20, on) == [("other", "older"), ("base", "old")]
    assert leaving(30, on) == [("other", "older"), ("base", "old"), ("base", "young")]
    assert leaving(40, on) == [("other", ""), ("base", "old"), ("base", "young")]
    assert leaving(50, on) == [("other", ""), ("small", ""), ("base", "old"), ("base", "young")]
    assert leaving(51, on) is None
    assert leaving(40, on, ("base", "other")) == [("small", ""), ("other", "older"), ("base", "old"), ("base", "young")]


def test_a_larger_lens_makes_the_leaving_of_an_older_small_one_needless() -> None:
    base = resident("base", 30, 9, lenses=(held("small", 5, 9), held("large", 30, 1), held("tiny", 1, 99)))
    assert leaving(25, host("h", 66, base)) == [("base", "large")]


def test_a_lens_that_is_there_already_needs_only_what_is_more() -> None:
    assert leaving(30, host("h", 60, resident("base", 30, 9, lenses=(held("new", 30),)))) == []


def test_lenses_of_a_model_that_cannot_leave_give_way_to_a_load() -> None:
    pinned = resident("base", 40, 9, pinned=True, lenses=(held("a", 20, 9), held("b", 20, 5)))
    on = host("h", 100, pinned, resident("idle", 10, 1), used_bytes=90)
    assert evicted(20, on) == ["idle"]
    plan = place(40, on, 10)
    assert [(e.model_id, e.lens_id) for e in plan.evictions] == [("idle", ""), ("base", "a")]
    assert plan.obtainable_bytes == 60
    assert evicted(61, on) is None


def test_what_came_lately_leaves_last_and_for_no_preload() -> None:
    """The older one was used last, and still makes room; the younger one only where nothing else gives enough."""
    new, old = resident("new", 50, 9, resident_seconds=5.0), resident("old", 50, 1, resident_seconds=900.0)
    on = host("h", 100, new, old)
    assert [e.model_id for e in place(50, on, 3, settled=600.0).evictions] == ["old"]
    assert [e.model_id for e in place(50, on, 3, settled=1.0).evictions] == ["new"]
    assert {e.model_id for e in place(80, on, 3, settled=600.0).evictions} == {"old", "new"}
    patient = place(80, on, 3, beside=Beside(spares="young"), settled=600.0)
    assert (patient.fits, patient.obtainable_bytes) == (False, 50)
    assert place(50, on, 3, beside=Beside(spares="young"), settled=600.0).fits
    assert not place(50, on, 3, beside=Beside(spares="all"), settled=600.0).fits


def test_a_model_that_comes_alone_sends_all_others_away() -> None:
    on = host("h", 100, resident("a", 10, 1), resident("source", 10, 2))
    placement = place(20, on, 3, beside=Beside(sources=(("source", 10),), alone=True))
    assert [(e.model_id, e.cause) for e in placement.evictions] == [("a", "exclusive")]
    in_use = host("h", 100, resident("a", 10, 1, leases=1))
    assert place(20, in_use, 3, beside=Beside(alone=True)).taken_by == "a"
    assert not place(20, host("h", 100, reserved_bytes=5), 3, beside=Beside(alone=True)).fits
    with pytest.raises(Exhausted, match="not to be shared") as refusal:
        raise does_not_fit(
            plan_load(
                Need(20, 0, 0, 0),
                [in_use],
                device="",
                fall_back=False,
                limit=3,
                seconds=1.0,
                beside=Beside(alone=True),
            ),
            3,
        )
    assert refusal.value.metadata["model_id"] == "a"


def test_nothing_comes_beside_a_model_that_wants_no_other_but_what_it_reads() -> None:
    alone = resident("alone", 10, 1, exclusive=True, reads=("source",))
    placement = place(20, host("h", 100, alone), 3, model_id="other")
    assert [(e.model_id, e.cause) for e in placement.evictions] == [("alone", "exclusive")]
    assert place(20, host("h", 100, alone), 3, model_id="source").evictions == ()
    in_use = host("h", 100, resident("alone", 10, 1, exclusive=True, leases=1))
    assert not place(20, in_use, 3, model_id="other").fits


def test_a_group_goes_where_what_it_reads_is() -> None:
    small, large = host("a", 100), host("b", 200, resident("source", 20, 1, host_id="b"))
    beside = Beside(sources=(("source", 20),))
    found = plan_load(
        Need(20, 0, 0, 0), [small, large], device="", fall_back=False, limit=3, seconds=1.0, beside=beside
    )
    assert found.best is not None
    assert (found.best.host.host_id, found.best.shared) == ("b", 1)
    assert plan(20, small, large).best.host.host_id == "a"


def shared(*processes: Host, device: int = 100) -> list[Host]:
    """Processes of one device of so many bytes."""
    taken = sum(each.used_bytes + each.reserved_bytes for each in processes)
    capped = [replace(each, cap_bytes=device - taken + each.used_bytes + each.reserved_bytes) for each in processes]
    return [replace(each, siblings=tuple(other for other in capped if other is not each)) for each in capped]


def leave_for(required: int, on: Host, **more: Any) -> list[tuple[str, str, bool]] | None:
    placement = place(required, on, 10, **more)
    return [(e.host_id, e.model_id, e.parked) for e in placement.evictions] if placement.fits else None


def test_models_in_other_processes_of_the_device_leave_by_the_same_rules() -> None:
    old, new = resident("old", 40, 9), resident("new", 40, 1)
    mine, _ = shared(host("x", 100, new), host("y", 100, old, park_bytes=40))
    assert leave_for(20, mine) == []
    assert leave_for(60, mine) == [("y", "old", True)]
    assert leave_for(100, mine) == [("y", "old", True), ("x", "new", False)]
    assert leave_for(60, mine, stays=("old",)) == [("x", "new", False)]
    mine, _ = shared(host("x", 100, new), host("y", 100, replace(old, leases=1)))
    assert leave_for(60, mine) == [("x", "new", False)]
    assert leave_for(61, mine) is None
    assert place(61, mine, 10).obtainable_bytes == 60


def test_what_another_process_holds_is_no_room_in_this_ones_budget() -> None:
    mine, _ = shared(host("x", 50, resident("mine", 40, 1)), host("y", 50, resident("other", 40, 9)))
    assert leave_for(20, mine) == [("x", "mine", False)]
    mine, _ = shared(host("x", 60, resident("mine", 40, 1)), host("y", 60, resident("other", 40, 9)), device=90)
    assert leave_for(20, mine) == [("y", "other", False)]
    assert leave_for(60, mine) == [("y", "other", False), ("x", "mine", False)]
    assert leave_for(61, mine) is None


def test_the_limit_of_models_is_about_one_process() -> None:
    mine, _ = shared(host("x", 100, resident("a", 10, 1)), host("y", 100, resident("b", 10, 9)))
    assert [(e.host_id, e.model_id) for e in place(10, mine, 1).evictions] == [("x", "a")]


def test_bytes_that_leave_one_process_for_a_load_of_another_are_counted_once() -> None:
    load = resident("new", 60, 0, state="loading", job_id="job_1", required_bytes=60)
    victim = resident("old", 50, 9, state="unloading", job_id="job_1")
    mine, other = shared(host("x", 100, load, used_bytes=0, reserved_bytes=60), host("y", 100, victim))
    assert (mine.device_free_bytes, other.device_free_bytes) == (40, 40)
    assert (mine.own_free_bytes, other.own_free_bytes) == (40, 50)


def test_a_model_that_wants_a_device_alone_wants_it_of_all_processes() -> None:
    alone = resident("alone", 10, 1, exclusive=True)
    mine, _ = shared(host("x", 100), host("y", 100, alone))
    placement = place(20, mine, 3, model_id="other")
    assert [(e.host_id, e.model_id, e.cause) for e in placement.evictions] == [("y", "alone", "exclusive")]
    assert place(20, mine, 3, model_id="alone").evictions == ()
    mine, _ = shared(host("x", 100), host("y", 100, replace(alone, leases=1)))
    assert place(20, mine, 3, model_id="other").taken_by == "alone"
    mine, _ = shared(host("x", 100), host("y", 100, resident("b", 10, 1)))
    assert [e.model_id for e in place(20, mine, 3, beside=Beside(alone=True)).evictions] == ["b"]
    mine, _ = shared(host("x", 100), host("y", 100, reserved_bytes=5))
    assert place(20, mine, 3, beside=Beside(alone=True)).taken_by == "a reservation"


def test_a_lens_sends_lenses_and_models_of_other_processes_away_too() -> None:
    base = resident("base", 40, 9)
    mine, _ = shared(host("x", 100, base), host("y", 100, resident("other", 30, 5, lenses=(held("l", 20, 3),))))
    assert [(e.host_id, e.lens_id) for e in place_lens(30, mine, ("base",), "new").evictions] == [("y", "l")]
    found = place_lens(40, mine, ("base",), "new").evictions
    assert [(e.host_id, e.model_id, e.lens_id) for e in found] == [("y", "other", "")]
    small, _ = shared(host("x", 50, base), host("y", 100, resident("other", 50, 5)))
    assert not place_lens(20, small, ("base",), "new").fits


def left(size: int, on: Host) -> list[tuple[str, str, bool]]:
    return [(e.lens_id or e.model_id, e.cause, e.parked) for e in place_lens(size, on, ("base",), "new").evictions]


@pytest.mark.parametrize(("park", "parked"), [(0, False), (19, False), (20, True)])
def test_a_lens_that_makes_room_is_parked_while_host_memory_has_room_for_it(park: int, parked: bool) -> None:
    base = resident("base", 40, 9, lenses=(held("a", 20, 9), held("b", 20, 5)))
    assert left(20, host("h", 80, base, park_bytes=park)) == [("a", "memory", parked)]


def test_a_lens_that_reads_another_model_is_not_parked_without_it() -> None:
    base = resident("base", 40, 9, lenses=(held("a", 20, 9, source="m"),))
    assert left(20, host("h", 60, base, park_bytes=100)) == [("a", "memory", False)]


def test_lenses_that_are_parked_give_way_to_others_and_to_models_but_models_to_no_lens() -> None:
    lenses = (held("here", 20, 5), held("old", 20, 30, state="parked"), held("new", 20, 9, state="parked"))
    base = resident("base", 40, 9, lenses=lenses)
    assert base.bytes == 60
    asleep = resident("asleep", 50, 99, state="parked")
    on = host("h", 60, base, asleep, park_bytes=90, used_bytes=60)
    assert left(20, on) == [("old", "park_limit", False), ("here", "memory", True)]
    alone = replace(base, lenses=lenses[:1])
    assert left(20, host("h", 60, alone, asleep, park_bytes=69, used_bytes=60)) == [("here", "memory", False)]
    on = host("h", 100, base, resident("idle", 40, 50), park_bytes=70, used_bytes=100)
    plan = place(30, on, 10)
    assert [(e.lens_id or e.model_id, e.cause, e.parked) for e in plan.evictions] == [
        ("old", "park_limit", False),
        ("idle", "memory", True),
    ]


def test_what_is_about_to_be_parked_has_its_host_memory_already() -> None:
    lenses = (held("here", 20, 5), held("parking", 20, 9, state="parking"), held("old", 20, 30, state="dropping"))
    base = resident("base", 40, 9, lenses=lenses)
    assert left(20, host("h", 80, base, park_bytes=40)) == [("here", "memory", False)]


def test_a_parked_lens_costs_the_device_all_its_bytes_and_keeps_its_place_until_it_is_back() -> None:
    base = resident("base", 40, 9, lenses=(held("here", 20, 5), held("new", 20, 9, state="parked")))
    on = host("h", 60, base, park_bytes=39)
    assert left(20, on) == [("here", "memory", False)]
    assert left(20, replace(on, park_bytes=40)) == [("here", "memory", True)]
    assert place_lens(20, on, ("base",), "new").restores
