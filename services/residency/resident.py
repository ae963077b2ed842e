"""One model in the pool: its weights, its lenses, who uses it, and what it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from services.residency.families import FAMILIES, facts, family_of
from services.residency.fingerprint import fingerprint
from services.residency.identity import check_layout
from services.residency.lenses import Base, Lens, Spec
from services.residency.lenses.extension import Extensions
from services.residency.loading import Prepared, load_tokenizer
from services.residency.park import Damaged, sums
from services.residency.quantize import resident_bytes, tensors_of

Residency = Literal["device", "parked"]


@dataclass(slots=True)
class Attached:
    """A lens on a resident model."""

    spec: Spec
    lens: Lens
    fingerprint: str = ""
    """Of the model while this lens alters it; empty for reading lenses."""
    leases: int = 0
    """Calls that have it in force, or read through it."""
    last_used: float = field(default_factory=time.monotonic)
    sums: tuple[int, ...] = ()
    """Of its tensors when they last went to host memory; empty where they never did."""

    @property
    def tensors(self) -> Iterable[Tensor]:
        """Its memory."""
        return self.lens.tensors

    @property
    def nbytes(self) -> int:
        """What it alone holds: layers that several extensions share are counted with the base."""
        return self.lens.nbytes

    @contextmanager
    def used(self) -> Iterator[None]:
        """It is not taken off inside the block."""
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1
            self.last_used = time.monotonic()


@dataclass(slots=True)
class Resident:
    """A model that the pool holds; everything but `leases` and `last_used` changes under `lock` only."""

    model_id: str
    directory: Path
    """Its files."""
    quantization: str
    base: Base
    tokenizer: PreTrainedTokenizerBase | None
    nbytes: int
    """Bytes of the base's tensors, measured."""
    fingerprint: str
    """Of the base with no altering lens in force."""
    state: Residency = "device"
    lenses: dict[str, Attached] = field(default_factory=dict)
    parked: dict[str, Attached] = field(default_factory=dict)
    """Lenses that are in host memory alone, wherever the base is; nothing of them is left in it."""
    active: str | None = None
    """Lens that generate and analyze take when they name none."""
    leaving: bool = False
    """It is being unloaded or parked; nobody gets a new lease."""
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    sums: tuple[int, ...] = ()
    """As a lens's, of the base."""

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def tensors(self) -> Iterable[Tensor]:
        """The base's memory."""
        return tensors_of(self.base.model).values()

    @property
    def base_bytes(self) -> int:
        """The base, and layers that several of its lenses share: what stays when any one of these leaves."""
        return self.nbytes + self.base.extensions.shared_bytes

    @property
    def total_bytes(self) -> int:
        """Base and lenses, without those that are parked alone."""
        return self.base_bytes + sum(attached.nbytes for attached in self.lenses.values())

    def enter(self) -> None:
        """One more lease."""
        self.leases += 1
        self.idle.clear()
        self.last_used = time.monotonic()

    def leave(self) -> None:
        """One lease less."""
        self.leases -= 1
        self.last_used = time.monotonic()
        if self.leases == 0:
            self.idle.set()


def remember(parked: Iterable[Resident | Attached]) -> None:
    """Keep the sums of what goes to host memory, before it does."""
    for part in parked:
        part.sums = sums(part.tensors)


def recognise(restored: Iterable[Resident | Attached]) -> None:
    """Compare them once it is back.

    Raises:
        Damaged: other bytes have come than have gone.
    """
    for part in restored:
        if part.sums and part.sums != sums(part.tensors):
            raise Damaged("host memory gave other bytes back than it was given")


def finished(model_id: str, prepared: Prepared, digest: str, parked_off: str | None) -> Resident:
    """A loaded model as the pool keeps it; one that came parked has no fingerprint, unless its device is a CPU.

    Args:
        model_id: its key.
        prepared: filled.
        digest: of its files.
        parked_off: the device that it came parked beside; None where it is on it.

    Raises:
        UnsupportedModel: a decoder-only model whose hook points are unknown, or are not where its modules let expect.
    """
    model = prepared.model
    family = None if model.config.is_encoder_decoder else family_of(model)
    if family is not None and family.name not in FAMILIES:
        check_layout(model, family)
    base = Base(model, family, facts(model.config.to_dict()), digest, Extensions())
    tokenizer = load_tokenizer(prepared.directory)
    resident = Resident(
        model_id,
        prepared.directory,
        prepared.quantization,
        base,
        tokenizer,
        nbytes=resident_bytes(model),
        fingerprint=fingerprint(model) if parked_off in (None, "cpu") else "",
        state="device" if parked_off is None else "parked",
    )
    if parked_off not in (None, "cpu"):
        remember([resident])
    return resident
