"""A model while somebody uses it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from services.kit import errors
from services.residency.families import Facts, Family
from services.residency.lenses.extension import Extensions
from services.residency.resident import Resident

P = ParamSpec("P")
T = TypeVar("T")
Runner = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs torch work on the device's one thread."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A model that stays where it is until the lease ends."""

    record: Resident
    extension: str | None
    _run: Runner

    @property
    def model(self) -> torch.nn.Module:
        """The transformers model, in eval mode, without any altering lens; touch it inside `run` only."""
        return self.record.base.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, None where it has none."""
        return self.record.tokenizer

    @property
    def family(self) -> Family:
        """Its module map.

        Raises:
            errors.Unsupported: the model has no hook points.
        """
        if self.record.base.family is None:
            raise errors.Unsupported(f"models of type {self.facts.model_type} have no hook points")
        return self.record.base.family

    @property
    def facts(self) -> Facts:
        """What its config says."""
        return self.record.base.facts

    @property
    def attached(self) -> Extensions:
        """What is attached to the base; touch it inside `run` only."""
        return self.record.base.extensions

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run torch work on the device's thread with the lease's extension in force."""

        def call() -> T:
            with self.record.base.extensions.using(self.extension):
                return fn(*args, **kwargs)

        return await self._run(call)
