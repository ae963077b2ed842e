from __future__ import annotations

from services.runtime.backoff import RestartPolicy


def test_delays_grow_to_half_a_minute_and_the_fifth_crash_is_one_too_many():
    policy = RestartPolicy()
    assert [policy.crashed(now) for now in (0.0, 1.0, 4.0, 13.0, 44.0)] == [0.5, 2.0, 8.0, 30.0, None]


def test_crashes_are_forgotten_after_five_minutes():
    policy = RestartPolicy()
    for now in (0.0, 1.0, 2.0, 3.0):
        policy.crashed(now)
    assert policy.crashed(303.5) == 0.5
    assert policy.crashed(304.0) == 2.0


def test_a_crash_exactly_at_the_edge_of_the_window_still_counts():
    policy = RestartPolicy()
    policy.crashed(0.0)
    assert policy.crashed(300.0) == 2.0
