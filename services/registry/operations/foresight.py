"""What a user will switch to next, by what was switched to before; it is brought where there is room for it."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from services.kit.errors import LensmeshError, NotFound
from services.kit.ids import new_id
from services.kit.logs import get_logger
from services.registry.domain import Caller
from services.registry.habits import Place
from services.registry.operations.turns import serving
from services.registry.ports import Transaction

if TYPE_CHECKING:
    from services.registry.operations.registry import Registry

USERS = 1000
"""Users whose last switch is remembered."""
AT_ONCE = 20
"""Users for whom is looked ahead in one round; the others' habits are kept all the same."""


class Foresight:
    """What users switched to since the last round, kept in memory: a habit that is lost with the process is no fact."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, Place] = OrderedDict()
        self._foreseen: dict[str, Place] = {}
        self._steps: Counter[tuple[str, Place, Place]] = Counter()
        self._moved: dict[str, None] = {}

    def note(self, registry: Registry, caller: Caller, group_id: str, lens_id: str | None) -> None:
        """A user asked for a switch."""
        if caller.internal or not registry.limits.predictive_preload:
            return
        subject, here = caller.subject, Place(group_id, lens_id or "")
        if (foreseen := self._foreseen.pop(subject, None)) is not None:
            registry.gauges.foreseen(hit=foreseen == here)
        before = self._last.pop(subject, None)
        self._last[subject] = here
        if len(self._last) > USERS:
            gone, _ = self._last.popitem(last=False)
            self._foreseen.pop(gone, None)
        if before not in (None, here):
            self._steps[subject, before, here] += 1
        self._moved[subject] = None

    async def look_ahead(self, registry: Registry) -> None:
        """Keep the habits, and preload for those who moved what they are likely to want next.

        Raises:
            LensmeshError: the database does not answer; what was not kept is kept in the next round.
        """
        steps, moved = self._steps, self._moved
        self._steps, self._moved = Counter(), {}
        try:
            if steps:
                async with registry.store.transaction() as tx:
                    await tx.habits.keep(steps)
        except LensmeshError:
            self._steps += steps
            raise
        for subject in list(moved)[:AT_ONCE]:
            if (here := self._last.get(subject)) is None:
                continue
            async with registry.store.transaction() as tx:
                likely = await tx.habits.likely(subject, here)
                if likely is not None and likely.group_id != here.group_id and not await _is_whole(tx, here.group_id):
                    self._moved[subject] = None
                    continue
            if likely is not None and self._last.get(subject) == here:
                self._foreseen[subject] = likely
                await _preload(registry, subject, likely)

    async def run(self, registry: Registry) -> None:
        """Until cancelled, look ahead once a second."""
        while True:
            await asyncio.sleep(1.0)
            try:
                await self.look_ahead(registry)
            except LensmeshError as error:
                get_logger("registry").warning("not looked ahead", reason=error.reason, error=error.message)


async def _is_whole(tx: Transaction, group_id: str) -> bool:
    """Whether a base is there with every lens that comes with it: until then the device's room is theirs."""
    try:
        group = await tx.groups.get(group_id)
    except NotFound:
        return True
    copy = await serving(tx, group.model_id)
    coming = [lens for lens in group.lenses if lens.error_code is None and not lens.activation_source_model_id]
    return copy is not None and {lens.id for lens in coming} <= set(copy.lens_ids)


async def _preload(registry: Registry, subject: str, likely: Place) -> None:
    """Queue a preload, unless everything is there or one is under way."""
    async with registry.store.transaction() as tx:
        try:
            group = await tx.groups.get(likely.group_id)
            wanted = [group.lens(likely.lens_id).id] if likely.lens_id else []
        except NotFound:
            return
        copy = await serving(tx, group.model_id)
        if copy is not None and set(wanted) <= set(copy.lens_ids):
            return
        payload = {"group_id": group.id, "model_id": group.model_id, "lens_ids": wanted, "foreseen": True}
        if not await tx.habits.preloading(group.id):
            await tx.enqueue_preload(new_id("job"), payload, subject)
