"""What is noted of users, without a database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from services.registry.domain import Caller
from services.registry.habits import Place
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


class Mesh:
    """A registry of two groups, of which one was always followed by the other; also its store and its transaction."""

    def __init__(self) -> None:
        self.limits = SimpleNamespace(predictive_preload=True)
        self.store = self.habits = self.groups = self.placement = self
        self.on_device: dict[str, list[str]] = {}
        """By model, the lenses that are there."""
        self.preloads: list[str] = []

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Mesh]:
        yield self

    async def likely(self, subject: str, here: Place) -> Place | None:
        return Place("h", "") if here.group_id == "g" else None

    async def get(self, group_id: str) -> Any:
        def lens(lens_id: str, **facts: str | None) -> Any:
            return SimpleNamespace(id=lens_id, **{"error_code": None, "activation_source_model_id": None} | facts)

        lenses = [lens("l"), lens("bad", error_code="LENS_INCOMPATIBLE"), lens("other", activation_source_model_id="n")]
        return SimpleNamespace(id=group_id, model_id=f"m_{group_id}", lenses=lenses if group_id == "g" else [])

    async def of_model(self, model_id: str) -> list[Any]:
        lenses = self.on_device.get(model_id)
        return [] if lenses is None else [SimpleNamespace(state="resident", lens_ids=tuple(lenses))]

    async def preloading(self, group_id: str) -> bool:
        return group_id in self.preloads

    async def enqueue_preload(self, job_id: str, payload: Mapping[str, Any], subject: str) -> None:
        self.preloads.append(payload["group_id"])


async def test_another_base_waits_until_this_one_has_the_lenses_that_come_with_it() -> None:
    seer, mesh = Foresight(), Mesh()
    seer.note(mesh, user("ada"), "g", None)  # type: ignore[arg-type]
    for on_device, preloads in (({}, []), ({"m_g": []}, []), ({"m_g": ["l"]}, ["h"])):
        mesh.on_device = on_device
        await seer.look_ahead(mesh)  # type: ignore[arg-type]
        assert mesh.preloads == preloads
    await seer.look_ahead(mesh)  # type: ignore[arg-type]
    assert mesh.preloads == ["h"]
