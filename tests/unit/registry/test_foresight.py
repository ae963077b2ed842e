"""What is noted of users, without a database."""

from __future__ import annotations

from types import SimpleNamespace

from services.registry.domain import Caller
from services.registry.operations import foresight
from services.registry.operations.foresight import Foresight


def user(name: str, *, internal: bool = False) -> Caller:
    return Caller(name, internal=internal, admin=False, loads_per_hour=None)


class Registry:
    def __init__(self, *, on: bool = True) -> None:
        self.limits = SimpleNamespace(predictive_preload=on)


def steps(seer: Foresight) -> list[tuple[str, str, str]]:
    return [(subject, before.lens_id, after.lens_id) for subject, before, after in seer._steps]


def test_steps_are_of_one_user_each_and_repetitions_are_none() -> None:
    seer, registry = Foresight(), Registry()
    for name, lens in (("ada", "x"), ("bob", "y"), ("ada", "x"), ("ada", "z"), ("bob", None)):
        seer.note(registry, user(name), "g", lens)  # type: ignore[arg-type]
    assert steps(seer) == [("ada", "x", "z"), ("bob", "y", "")]


def test_nothing_is_noted_of_the_mesh_itself_or_when_it_is_off() -> None:
    seer = Foresight()
    for lens in ("x", "y"):
        seer.note(Registry(), user("mesh", internal=True), "g", lens)  # type: ignore[arg-type]
        seer.note(Registry(on=False), user("ada"), "g", lens)  # type: ignore[arg-type]
    assert steps(seer) == []


def test_only_so_many_users_are_remembered() -> None:
    seer, registry = Foresight(), Registry()
    for number in range(foresight.USERS + 1):
        seer.note(registry, user(str(number)), "g", "x")  # type: ignore[arg-type]
    seer.note(registry, user("0"), "g", "y")  # type: ignore[arg-type]
    seer.note(registry, user(str(foresight.USERS)), "g", "y")  # type: ignore[arg-type]
    assert steps(seer) == [(str(foresight.USERS), "x", "y")]
