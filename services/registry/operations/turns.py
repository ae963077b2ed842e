"""Switches of lenses: those on one base take turns, and those that wait for the same turn are done together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from services.kit.errors import LensmeshError, NotFound
from services.kit.gathering import Gathering
from services.registry.domain import Residency
from services.registry.failures import not_resident
from services.registry.ports import Switched, Transaction

if TYPE_CHECKING:
    from services.registry.operations.registry import Registry


@dataclass(frozen=True, slots=True)
class Wish:
    """A lens that shall be the active one of its group."""

    group_id: str
    lens_id: str | None
    """None for the base alone."""
    began: float | None = None
    """`time.perf_counter` when a switch from another group began; None for one within the group."""

    @property
    def kind(self) -> str:
        """Of the switch: within or cross."""
        return "within" if self.began is None else "cross"


@dataclass(frozen=True, slots=True)
class Absent:
    """The lens is not on the device where its base is."""

    copy: Residency


class Turns:
    """Who waits for a turn, by base. Nobody holds a connection while he waits."""

    def __init__(self) -> None:
        self._bases: dict[str, str] = {}
        self._waiting: dict[str, Gathering[Wish, Switched | Absent]] = {}

    async def take(self, registry: Registry, wish: Wish) -> Switched | Absent:
        """Make the lens the active one of its group, unless it is not on the device.

        A switch that another one of the same turn overtakes needs no call of the device: all of a turn were asked for
        before any of them was answered, so the order in which they are told is one in which they can have happened.

        Raises:
            NotFound: no such group or lens.
            Conflict: `GROUP_NOT_RESIDENT`.
        """
        base = self._bases.get(wish.group_id)
        if base is None:
            async with registry.store.transaction() as tx:
                base = (await tx.groups.get(wish.group_id)).model_id
            self._bases[wish.group_id] = base
        if base not in self._waiting:
            self._waiting[base] = Gathering(partial(_turn, registry, base))
        try:
            return await self._waiting[base].ask(wish)
        except NotFound:
            self._bases.pop(wish.group_id, None)
            raise


async def _turn(registry: Registry, model_id: str, wishes: list[Wish]) -> list[Switched | Absent | Exception]:
    try:
        return await _together(registry, model_id, wishes)
    except NotFound:  # the device does not have what the rows say; the others are not to suffer for it
        if len(wishes) == 1:
            raise
    answers: list[Switched | Absent | Exception] = []
    for wish in wishes:
        try:
            answers += await _together(registry, model_id, [wish])
        except LensmeshError as error:
            answers.append(error)
    return answers


async def _together(registry: Registry, model_id: str, wishes: list[Wish]) -> list[Switched | Absent | Exception]:
    async with registry.store.transaction() as tx:
        lenses = await tx.groups.begin_turn(model_id, [wish.lens_id for wish in wishes if wish.lens_id])
        copy = await serving(tx, model_id)
        answers = [_obstacle(wish, lenses, model_id, copy) for wish in wishes]
        done = [wish for wish, obstacle in zip(wishes, answers, strict=True) if obstacle is None]
        if copy is not None and done:
            switched = await registry.hosts.switch_lens(copy.address, model_id, done[-1].lens_id)
            each = {wish: _timed(wish, switched) for wish in done}
            await tx.groups.end_turn(
                model_id, [(wish.group_id, wish.lens_id, wish.kind, each[wish].seconds) for wish in done]
            )
            await tx.placement.touch_lenses(copy.host_id, [wish.lens_id for wish in done if wish.lens_id])
            await tx.emit_all([told for wish in done for told in _told(wish, each[wish])])
    return [obstacle or each[wish] for wish, obstacle in zip(wishes, answers, strict=True)]


def _obstacle(
    wish: Wish, lenses: dict[str, set[str]], model_id: str, copy: Residency | None
) -> Absent | Exception | None:
    """Why a wish is not fulfilled in this turn."""
    if wish.group_id not in lenses:
        return NotFound(f"There is no group {wish.group_id}", metadata={"group_id": wish.group_id})
    if wish.lens_id is not None and wish.lens_id not in lenses[wish.group_id]:
        facts = {"group_id": wish.group_id, "lens_id": wish.lens_id}
        return NotFound(f"Group {wish.group_id} has no lens {wish.lens_id}", metadata=facts)
    if copy is None:
        return not_resident(wish.group_id, model_id)
    return None if wish.lens_id is None or wish.lens_id in copy.lens_ids else Absent(copy)


def _timed(wish: Wish, switched: Switched) -> Switched:
    return switched if wish.began is None else replace(switched, seconds=time.perf_counter() - wish.began)


def _told(wish: Wish, switched: Switched) -> Sequence[tuple[str, str, dict[str, object]]]:
    return switch_events(wish.group_id, wish.lens_id, wish.kind, switched)


def switch_events(
    group_id: str, lens_id: str | None, kind: str, switched: Switched
) -> list[tuple[str, str, dict[str, object]]]:
    """What watchers of a group are told about a switch."""
    facts: dict[str, object] = {"group_id": group_id, "lens_id": lens_id, "kind": kind}
    figures: dict[str, object] = {
        "seconds": switched.seconds,
        "memory_before_bytes": switched.memory_before_bytes,
        "memory_after_bytes": switched.memory_after_bytes,
    }
    done = ("group:switched", group_id, facts | figures)
    # One between groups was announced when it was queued.
    return [("group:switching", group_id, facts), done] if kind == "within" else [done]


async def serving(tx: Transaction, model_id: str) -> Residency | None:
    """The copy of a base that serves; None where it is on no device."""
    return next((copy for copy in await tx.placement.of_model(model_id) if copy.state == "resident"), None)
