"""Which copy of a model a forward goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.registry.domain import Residency

if TYPE_CHECKING:
    from services.registry.operations.registry import Registry


class Spread:
    """Forwards that run through this process, by model and host."""

    def __init__(self) -> None:
        self._running: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def over(
        self, registry: Registry, copies: Sequence[Residency], lens_ids: Collection[str] = ()
    ) -> Iterator[Residency | None]:
        """The copy for a forward while the block makes it: the one that serves, or with duplication the least busy.

        Args:
            registry: the registry.
            copies: of one model, the one that serves first.
            lens_ids: lenses that should be there; the copy that serves gets those that are not.
        """
        resident = [copy for copy in copies if copy.state == "resident"]
        able = [copy for copy in resident if set(lens_ids) <= set(copy.lens_ids)] or resident[:1]
        if not registry.limits.duplicate_at:
            able = resident[:1]
        if not able:
            yield None
            return
        chosen = min(able, key=lambda copy: self._running[copy.model_id, copy.host_id])
        key = chosen.model_id, chosen.host_id
        self._running[key] += 1
        try:
            yield chosen
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
