"""Which copies are hot, where there is an idle device for another one, and which of them a forward takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from services.registry.operations.duplicating import hot
from services.registry.operations.spread import Spread
from tests.unit.registry.test_planning import host, resident


def registry(duplicate_at: int) -> Any:
    return SimpleNamespace(limits=SimpleNamespace(duplicate_at=duplicate_at))


def found(*hosts: Any) -> list[tuple[str, str]]:
    return [(copy.model_id, idle.host_id) for copy, idle in hot(hosts, 3)]


def test_a_model_is_hot_when_all_its_copies_are_and_goes_to_an_idle_device_of_the_same_kind() -> None:
    busy = host("busy", 100, resident("m", 10, 1, host_id="busy", leases=3))
    assert found(busy, host("idle")) == [("m", "idle")]
    assert found(host("busy", 100, resident("m", 10, 1, host_id="busy", leases=2)), host("idle")) == []
    assert found(busy, host("gpu", device="cuda:0")) == []
    assert found(busy, host("reserved", reserved_bytes=5)) == []
    assert found(busy, host("other", 100, resident("x", 10, 1, host_id="other", leases=1))) == []
    second = host("second", 100, resident("m", 10, 1, host_id="second", leases=0))
    assert found(busy, second, host("idle")) == []
    assert found(busy, host("second", 100, resident("m", 10, 1, host_id="second", state="loading")), host("idle")) == []
    assert found(busy, host("parked", 100, resident("m", 10, 1, host_id="parked", state="parked"))) == [("m", "parked")]


def test_two_hot_models_do_not_go_to_the_same_device() -> None:
    busy = host("busy", 100, *(resident(name, 10, 1, host_id="busy", leases=3) for name in "mn"))
    assert found(busy, host("idle")) == [("m", "idle")]
    assert found(busy, host("idle"), host("other")) == [("m", "idle"), ("n", "other")]


def test_forwards_are_spread_over_copies_that_have_the_lenses() -> None:
    spread, copies = Spread(), [resident("m", 10, 1, host_id=name) for name in ("a", "b")]
    with spread.over(registry(3), copies) as first, spread.over(registry(3), copies) as second:
        assert (first.host_id, second.host_id) == ("a", "b")  # type: ignore[union-attr]
        with spread.over(registry(3), copies, ["lens"]) as third:
            assert third.host_id == "a"  # type: ignore[union-attr]
    with spread.over(registry(3), copies) as again:
        assert again.host_id == "a"  # type: ignore[union-attr]
    with spread.over(registry(0), copies) as one, spread.over(registry(0), copies) as other:
        assert one is other is copies[0]
    with spread.over(registry(3), []) as none:
        assert none is None
