"""The pool against a model of it in plain Python: whatever is done in whatever order, and whatever fails on the way."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.kit import errors
from services.residency import estimate
from services.residency import pool as pools
from services.residency.fingerprint import fingerprint
from services.residency.lenses import Spec, tuned_lens
from services.residency.pool import Pool
from services.residency.quantize import resident_bytes
from tests import models

MODELS = {"a": ("gpt2", "none"), "b": ("llama", "int8"), "c": ("gpt2", "bf16")}
LENSES = ("l", "m")
NOBODY = "nobody"
names, lens_names = st.sampled_from([*MODELS, NOBODY]), st.sampled_from(LENSES)
STAGES = ("", "", "", "prepare", "fill", "out of memory", "finish", "digest")
STEPS = {
    "load": (st.sampled_from([*MODELS]), st.sampled_from(STAGES)),
    "unload": (names,),
    "lease": (names,),
    "release": (names,),
    "park": (names, st.sampled_from([False, False, True])),
    "restore": (names, st.sampled_from(["", "", "changed", "move", "check"])),
    "attach": (names, lens_names, st.booleans()),
    "evict_lens": (names, lens_names | st.just("the active one")),
    "switch": (names, lens_names | st.none()),
    "crash": (st.sampled_from([False] * 4 + [True]),),
}
"""What may happen, and with what; drawn by one rule, for of several rules most are left out of most runs."""
OFTEN = ("load", "load", "park", "park")
"""What makes of one model several, some of them parked."""


@dataclass
class Expected:
    """A resident model as it should be."""

    parked: bool = False
    lenses: set[str] = field(default_factory=set)
    active: str | None = None
    leases: list[AsyncExitStack] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    """The pool holds about two of the three models."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        tuned_lens.save(Path(self.folder.name), {0: (torch.eye(models.WIDTH), torch.zeros(models.WIDTH))})
        self.lens_bytes = 4 * models.WIDTH * (models.WIDTH + 1)
        self.prints, self.sizes, self.needs = {}, {}, {}
        for name in MODELS:
            self.prints[name], self.sizes[name], self.needs[name] = figures(name)
        self.budget = max(self.needs.values()) + sorted(self.sizes.values())[1] + 2 * self.lens_bytes
        self.park_budget = max(self.sizes.values()) + self.lens_bytes
        self.give_back, pools.give_back = pools.give_back, lambda device: 0  # collecting garbage takes most of the time
        self.fresh()

    def fresh(self) -> None:
        """A new process: nothing of the former one is left."""
        self.pool = Pool("cpu", self.budget, self.park_budget)
        self.here: dict[str, Expected] = {}

    def begin(self) -> None:
        """A first model comes, with an active lens."""
        self.load("a", "")
        self.attach("a", "l", corrupt=False)
        self.switch("a", "l")

    @rule(what=st.one_of(st.tuples(st.just(name), *STEPS[name]) for name in (*STEPS, *OFTEN)))
    def step(self, what: tuple[Any, ...]) -> None:
        """One of `STEPS`; there is a model to do it to."""
        if not self.here:
            self.begin()
        getattr(self, what[0])(*what[1:])

    def one(self, name: str) -> str:
        """A model that is here rather than one that is not: nothing would happen to that."""
        return name if name in self.here or name == NOBODY else next(iter(self.here), NOBODY)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.end()
            self.loop.close()
            pools.give_back = self.give_back
            self.folder.cleanup()

    def run(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(work)

    def refused(self, work: Awaitable[Any], *reasons: str) -> None:
        """The call fails for this reason, and the invariants say that nothing changed."""
        with pytest.raises(errors.LensmeshError) as caught:
            self.run(work)
        assert caught.value.reason in reasons

    def lens_size(self, name: str, lens: str) -> int:
        return self.lens_bytes // (2 if MODELS[name][1] == "bf16" else 1) if lens == "l" else 0

    def size(self, name: str) -> int:
        return self.sizes[name] + sum(self.lens_size(name, lens) for lens in self.here[name].lenses)

    def total(self, *, parked: bool) -> int:
        return sum(self.size(name) for name, each in self.here.items() if each.parked == parked)

    @property
    def room(self) -> int:
        return self.budget - self.total(parked=False)

    def load(self, name: str, stage: str) -> None:
        family, quantization = MODELS[name]
        work = lambda: self.pool.load(  # noqa: E731
            name, models.saved(family), quantization, expected_digest="0" * 64 if stage == "digest" else ""
        )
        if name in self.here:
            assert self.run(work()).model_id == name
        elif stage == "prepare":
            self.failing(pools.loading, "prepare", OSError("gone"), work, "MODEL_LOAD_FAILED")
        elif self.needs[name] > self.room:
            self.refused(work(), "INSUFFICIENT_MEMORY")
        elif stage == "fill":
            self.failing(pools.loading, "fill", pools.loading.LoadFailed("cut"), work, "MODEL_LOAD_FAILED")
        elif stage == "out of memory":
            self.failing(pools.loading, "fill", MemoryError(), work, "DEVICE_OOM")
        elif stage == "finish":
            self.failing(pools, "finished", RuntimeError("CUDA error: out of memory"), work, "DEVICE_OOM")
        elif stage == "digest":
            self.refused(work(), "CHECKSUM_MISMATCH")
        else:
            self.run(work())
            self.here[name] = Expected()

    def failing(self, module: Any, name: str, error: Exception, work: Any, reason: str) -> None:
        def fail(*_: object) -> None:
            raise error

        original = getattr(module, name)
        setattr(module, name, fail)
        try:
            self.refused(work(), reason)
        finally:
            setattr(module, name, original)

    def unload(self, name: str) -> None:
        name = self.one(name)
        if name in self.here and self.here[name].leases:
            self.refused(self.pool.unload(name), "IN_USE")
        else:
            expected = self.size(name) if name in self.here else 0
            assert self.run(self.pool.unload(name)) == expected
            self.here.pop(name, None)

    def lease(self, name: str) -> None:
        name = self.one(name)
        stack = AsyncExitStack()
        work = stack.enter_async_context(self.pool.lease(name))
        if name not in self.here or self.here[name].parked:
            self.refused(work, "WRONG_STATE")
        else:
            self.run(work)
            self.here[name].leases.append(stack)

    def release(self, name: str) -> None:
        name = self.one(name)
        if name in self.here and self.here[name].leases:
            self.run(self.here[name].leases.pop().aclose())

    def park(self, name: str, short: bool) -> None:
        name = self.one(name)
        if name not in self.here:
            self.refused(self.pool.park(name), "WRONG_STATE")
        elif self.here[name].parked:
            assert self.run(self.pool.park(name)) == 0
        elif self.here[name].leases:
            self.refused(self.pool.park(name), "IN_USE")
        elif self.size(name) > self.park_budget - self.total(parked=True):
            self.refused(self.pool.park(name), "INSUFFICIENT_MEMORY")
        elif short:
            self.failing_to_move(lambda: self.pool.park(name))
        else:
            assert self.run(self.pool.park(name)) == self.size(name)
            self.here[name].parked = True

    def failing_to_move(self, work: Any) -> None:
        """Memory runs out on the way to another device."""
        self.pool.device = "elsewhere"
        self.failing(pools, "move", MemoryError(), work, "DEVICE_OOM")
        self.pool.device = "cpu"

    def restore(self, name: str, stage: str) -> None:
        name = self.one(name)
        if name not in self.here or not self.here[name].parked:
            return
        if self.size(name) > self.room:
            self.refused(self.pool.restore(name), "INSUFFICIENT_MEMORY")
        elif stage == "move":
            self.failing_to_move(lambda: self.pool.restore(name))
        elif stage == "check":
            self.failing(pools, "_fingerprint", MemoryError(), lambda: self.pool.restore(name), "DEVICE_OOM")
        elif stage == "changed":
            with torch.no_grad():
                next(p for p in self.pool.get(name).base.model.parameters() if p.is_floating_point()).add_(1)
            self.refused(self.pool.restore(name), "FINGERPRINT_MISMATCH")
            del self.here[name]
        else:
            self.run(self.pool.restore(name))
            self.here[name].parked = False

    def attach(self, name: str, lens: str, corrupt: bool) -> None:
        name = self.one(name)
        files = Path(self.folder.name) / ("none" if corrupt else "")
        spec = Spec(lens, "tuned_lens", files) if lens == "l" else Spec(lens, "logit_lens")
        work = self.pool.attach(name, spec)
        if name not in self.here or self.here[name].parked:
            self.refused(work, "WRONG_STATE")
        elif lens == "l" and lens in self.here[name].lenses and corrupt:
            work.close()  # other files would take the old ones' place; that has a test of its own
        elif lens not in self.here[name].lenses and corrupt and lens == "l":
            self.refused(work, "CHECKSUM_MISMATCH")
        elif lens not in self.here[name].lenses and self.lens_size(name, lens) > self.room:
            self.refused(work, "INSUFFICIENT_MEMORY")
        else:
            self.run(work)
            self.here[name].lenses.add(lens)

    def evict_lens(self, name: str, lens: str) -> None:
        name = self.one(name)
        if name in self.here:
            lens = (self.here[name].active or "l") if lens == "the active one" else lens
            expected = self.lens_size(name, lens) if lens in self.here[name].lenses else 0
            assert self.run(self.pool.detach(name, lens)) == expected
            self.here[name].lenses.discard(lens)
            if self.here[name].active == lens:
                self.here[name].active = None

    def switch(self, name: str, lens: str | None) -> None:
        name = self.one(name)
        if name not in self.here or self.here[name].parked:
            self.refused(self.pool.switch(name, lens), "WRONG_STATE")
        elif lens is not None and lens not in self.here[name].lenses:
            self.refused(self.pool.switch(name, lens), "NOT_FOUND")
        else:
            self.run(self.pool.switch(name, lens))
            self.here[name].active = lens

    def crash(self, now: bool) -> None:
        """kill -9: leases end nowhere, and the next process has nothing."""
        if now:
            self.end()
            self.fresh()

    def end(self) -> None:
        """The process is gone."""
        for each in self.here.values():
            for stack in each.leases:
                self.run(stack.aclose())
        self.run(self.pool.close())

    @invariant()
    def the_pool_is_as_the_model_says(self) -> None:
        if not hasattr(self, "pool"):
            return
        found = {
            r.model_id: (r.state == "parked", set(r.lenses), r.active, r.leases, r.leaving) for r in self.pool.residents
        }
        assert found == {
            name: (each.parked, each.lenses, each.active, len(each.leases), False) for name, each in self.here.items()
        }
        assert self.pool.used_bytes == self.total(parked=False) <= self.budget
        assert self.pool.parked_bytes == self.total(parked=True) <= self.park_budget
        assert self.pool.reserved_bytes == 0
        for resident in self.pool.residents:
            assert resident.fingerprint == self.prints[resident.model_id]
            assert resident.nbytes == resident_bytes(resident.base.model)


@cache
def figures(name: str) -> tuple[str, int, int]:
    """Fingerprint, bytes, and bytes while it loads."""
    family, quantization = MODELS[name]
    prepared = pools.loading.prepare(models.saved(family), quantization)
    need = estimate.laid_out(prepared.model, prepared.entries, quantization, prepared.dtype, "cpu").required
    model = pools.loading.fill(prepared, "cpu", lambda done, total: None)
    return fingerprint(model), resident_bytes(model), need


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=10, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
