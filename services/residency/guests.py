"""Lenses that are on a model only while calls use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.residency.pool import Pool


@dataclass(slots=True)
class _Stay:
    calls: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the lens comes or goes, so that a call neither finds it half gone nor has it taken away."""


class Guests:
    """Counts the calls that use a lens which is not attached for good; the last one takes it off again."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._stays: dict[tuple[str, str], _Stay] = {}

    def keep(self, model_id: str, lens_id: str) -> None:
        """The lens is attached for good from now on."""
        self._stays.pop((model_id, lens_id), None)

    @asynccontextmanager
    async def staying(
        self, model_id: str, lens_id: str, attach: Callable[[], Awaitable[object]]
    ) -> AsyncIterator[None]:
        """The lens is attached inside the block: it is there already, or `attach` brings it.

        Raises:
            errors.LensmeshError: see `Pool.attach`.
        """
        key = (model_id, lens_id)
        if key not in self._stays and lens_id in self._pool.get(model_id).lenses:
            yield
            return
        stay = self._stays.setdefault(key, _Stay())
        stay.calls += 1
        try:
            async with stay.lock:
                await attach()
            yield
        finally:
            stay.calls -= 1
            async with stay.lock:
                if stay.calls == 0 and self._stays.get(key) is stay:
                    try:
                        if any(resident.model_id == model_id for resident in self._pool.residents):
                            await self._pool.detach(model_id, lens_id)
                    finally:
                        if stay.calls == 0:
                            self._stays.pop(key, None)
