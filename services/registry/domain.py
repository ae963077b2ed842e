"""What the registry knows: models, hosts and their ledgers, groups and lenses, datasets; and the ids' rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.kit.errors import LensmeshError, NotFound
from services.registry.failures import load_failure

PRESSURE = 0.9
"""Share of a device's memory in use beyond which idle models leave without being asked."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    subject: str
    internal: bool
    """The mesh itself: per-user limits do not apply."""
    admin: bool
    """Has the scope model:admin."""
    loads_per_hour: int | None
    """Replaces the setting of that name, when the token says so."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of a model."""

    source: str
    """huggingface, local or custom."""
    identifier: str
    """Hub id, or path below a model root."""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A registered base transformer, as its row is."""

    id: str
    name: str
    model_type: str
    architecture: str | None
    source: str
    model_identifier: str
    revision: str | None
    config: dict[str, Any]
    quantization: str
    status: str
    """pending, loading, ready, failed or unloaded."""
    progress: float
    memory_usage_bytes: int | None
    load_time_seconds: float | None
    estimated_memory_bytes: int | None
    estimated_load_seconds: float | None
    parameter_count: int | None
    hidden_size: int | None
    num_layers: int | None
    vocab_size: int | None
    context_length: int | None
    file_bytes: int | None
    digest: str | None
    defaults: dict[str, Any] | None
    perplexities: list[dict[str, Any]]
    error_code: str | None
    error_message: str | None
    fingerprint: str | None
    fell_back_to_cpu: bool
    pinned: bool
    preload: bool
    wanted: bool
    """Desired state: it should be on a device."""
    version: int
    created_by: str
    created_at: datetime
    loaded_at: datetime | None
    last_used_at: datetime | None
    updated_at: datetime
    host_id: str | None = None
    """Host whose copy serves it."""
    device: str | None = None
    """`host/device` of that copy."""

    @property
    def files(self) -> Source:
        """Where its files come from."""
        return Source(self.source, self.model_identifier, self.revision or "")

    @property
    def etag(self) -> str:
        """Version that an update must name."""
        return str(self.version)

    @property
    def inspected(self) -> bool:
        """Whether its files were read: false while its hub was unreachable."""
        return bool(self.config)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's files hold, as a host reads them."""

    config: dict[str, Any]
    model_type: str
    architecture: str
    parameter_count: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    context_length: int
    file_bytes: int
    digest: str
    defaults: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a load needs, by cause."""

    weights: int
    quantization_state: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.quantization_state + self.activations + self.overhead

    def corrected(self, measured: int | None) -> Need:
        """With the bytes that an earlier load of the same weights really took; unchanged without a measurement."""
        if measured is None:
            return self
        return Need(
            max(0, measured - self.quantization_state), self.quantization_state, self.activations, self.overhead
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A load that was accepted, and how it ended."""

    id: str
    """Its job's."""
    model_id: str
    host_id: str
    quantization: str
    outcome: str
    """running, ready, failed or cancelled."""
    error_code: str | None = None
    error_message: str | None = None

    @property
    def failure(self) -> LensmeshError | None:
        """Why the model did not come; None while it may still, and when it did."""
        if self.outcome not in ("failed", "cancelled"):
            return None
        return load_failure(self.error_code or "INTERNAL", self.error_message or "The load did not end well")


@dataclass(frozen=True, slots=True)
class HeldLens:
    """A lens in one host process."""

    lens_id: str
    bytes: int
    last_used_at: datetime
    leases: int = 0
    state: str = "here"
    """coming, here, leaving or parking to make room for something, parked alone, or dropping from there."""
    job_id: str | None = None
    """The load that it makes room for."""
    source: str = ""
    """Model whose activations it reads; its base when empty."""

    @property
    def stowed(self) -> bool:
        """Whether it is in host memory alone, and costs the device nothing."""
        return self.state in ("parked", "dropping")

    @property
    def moving(self) -> bool:
        """Whether it comes or leaves right now."""
        return self.state not in ("here", "parked")


@dataclass(frozen=True, slots=True)
class Residency:
    """A model in one host process."""

    model_id: str
    host_id: str
    state: str
    """loading, resident, unloading, parking, parked in host memory, or lost with its host."""
    quantization: str
    required_bytes: int
    charge_bytes: int
    job_id: str | None
    leases: int
    active_lens_id: str | None
    loaded_at: datetime | None
    last_used_at: datetime
    pinned: bool = False
    lenses: tuple[HeldLens, ...] = ()
    needed_by: tuple[str, ...] = ()
    """Models with lenses there that read this one's activations."""
    address: str = ""
    device: str = ""
    """As torch names it."""
    incarnation: str = ""
    exclusive: bool = False
    """Whether a group of it wants the device alone."""
    reads: tuple[str, ...] = ()
    """Models whose activations lenses of its groups read."""
    resident_seconds: float | None = None
    """How long it has been on the device."""
    cause: str | None = None
    """Why it leaves, while it does."""

    @property
    def lens_ids(self) -> tuple[str, ...]:
        """Lenses that are there with it, and stay."""
        return tuple(lens.lens_id for lens in self.lenses if lens.state == "here")

    @property
    def bytes(self) -> int:
        """What its leaving gives back."""
        return self.charge_bytes + sum(lens.bytes for lens in self.lenses if not lens.stowed)

    def bytes_for(self, job_id: str | None) -> int:
        """What comes back of it on the device when all that leaves for a load has left."""
        if self.state in ("unloading", "parking"):
            return self.bytes if self.job_id == job_id else 0
        return sum(x.bytes for x in self.lenses if self.state == "resident" and x.job_id == job_id and not x.stowed)

    @property
    def moving(self) -> bool:
        """Whether a job brings it, parks it or drops it right now."""
        dropped = self.state == "parked" and self.job_id is not None
        return dropped or self.state in ("loading", "unloading", "parking")


@dataclass(frozen=True, slots=True)
class Host:
    """A device-owning process and the ledger of its device."""

    host_id: str
    incarnation: str
    address: str
    device: str
    kind: str
    total_bytes: int
    budget_bytes: int
    measured_bytes: int
    services: tuple[str, ...]
    temperature_celsius: float | None
    utilization_ratio: float | None
    lost: bool
    heartbeat_at: datetime
    park_bytes: int = 0
    """Host memory that parked models may take."""
    accelerator: str = ""
    """How CUDA_VISIBLE_DEVICES names its GPU on its machine; empty on a CPU."""
    used_bytes: int = 0
    reserved_bytes: int = 0
    parked_bytes: int = 0
    silent_seconds: float = 0.0
    power_watts: float | None = None
    device_used_bytes: int | None = None
    """In use on the whole device by every program, as it was measured last."""
    external_bytes: int = 0
    """Of that, what programs outside the mesh hold."""
    cap_bytes: int | None = None
    """What the process may hold beside the others that share its device, and beside other programs."""
    residents: tuple[Residency, ...] = ()
    siblings: tuple[Host, ...] = ()
    """The other live processes of its device."""

    @property
    def name(self) -> str:
        """`host/device`."""
        return f"{self.host_id}/{self.device}"

    @property
    def shared_residents(self) -> tuple[Residency, ...]:
        """What its device holds, in this process and the others."""
        return (*self.residents, *(r for process in self.siblings for r in process.residents))

    @property
    def free_bytes(self) -> int:
        """What neither a model, a lens, a load nor a reservation holds, here or in a process of the same device."""
        return min(self.own_free_bytes, self.device_free_bytes)

    @property
    def own_free_bytes(self) -> int:
        """What nobody holds of this process's budget."""
        return self.budget_bytes - self.used_bytes - self.reserved_bytes

    @property
    def device_free_bytes(self) -> int:
        """What no process holds of the device; bytes that leave one for a load of another count once."""
        if self.cap_bytes is None:
            return self.own_free_bytes
        twice = 0
        for load in (r for r in self.shared_residents if r.state == "loading"):
            leaving = (r.bytes_for(load.job_id) for r in self.shared_residents if r.host_id != load.host_id)
            twice += min(load.charge_bytes, sum(leaving))
        return self.cap_bytes - self.used_bytes - self.reserved_bytes + twice

    @property
    def pressed(self) -> bool:
        """Whether the device is nearly full, whoever fills it."""
        return self.device_used_bytes is not None and self.device_used_bytes > PRESSURE * self.total_bytes

    def answers_to(self, device: str) -> bool:
        """Whether a caller who names `device` means this one: `cpu`, `cuda:0`, `host` or `host/device`."""
        return device in ("", self.device, self.host_id, self.name)


@dataclass(frozen=True, slots=True)
class HostedLens:
    """A lens as its host sees it."""

    memory_bytes: int
    leases: int = 0
    idle_seconds: float = 0.0
    parked: bool = False


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model as its host sees it."""

    model_id: str
    quantization: str
    memory_bytes: int
    lenses: Mapping[str, HostedLens]
    """By lens id."""
    active_lens_id: str | None
    fingerprint: str
    leases: int
    idle_seconds: float
    parked: bool = False


@dataclass(frozen=True, slots=True)
class Beside:
    """What shall have room on a device beside a base, with bytes by id, and who may have to leave for it."""

    sources: tuple[tuple[str, int], ...] = ()
    """Models whose activations its lenses read."""
    lenses: tuple[tuple[str, int], ...] = ()
    alone: bool = False
    """Whether every other model has to leave."""
    spares: str = ""
    """Who does not have to leave: nobody, those that came within the minimum residency (young), or all."""


ALONE = Beside()


@dataclass(frozen=True, slots=True)
class Eviction:
    """A model that has to leave first, or one of its lenses alone."""

    model_id: str
    host_id: str
    """The process that it leaves; another one of the same device may be the one that gains."""
    bytes: int
    cause: str
    """memory, resident_limit, exclusive, or park_limit for one that is parked already."""
    parked: bool = False
    """Whether it stays in host memory."""
    lens_id: str = ""
    """The lens that leaves while its base stays; empty when the model leaves."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Whether and how a model fits a device."""

    host: Host
    fits: bool
    available_bytes: int
    """Free before any eviction."""
    obtainable_bytes: int
    """Free after everything idle had left."""
    evictions: tuple[Eviction, ...]
    required_bytes: int
    restores: bool = False
    """Whether the model is parked there, and is moved back rather than loaded."""
    shared: int = 0
    """Models there whose activations its lenses read."""
    taken_by: str = ""
    """A model in use that stands in the way of one that is to be alone."""

    @property
    def own_freed_bytes(self) -> int:
        """What the evictions give back to the budget of this process."""
        own = (each for each in self.evictions if each.host_id == self.host.host_id)
        return sum(each.bytes for each in own if each.cause != "park_limit")

    @property
    def device(self) -> str:
        """`host/device`."""
        return self.host.name


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load needs and where it would go; placements best first."""

    need: Need
    placements: tuple[Placement, ...]
    estimated_seconds: float
    fell_back: bool = False

    @property
    def best(self) -> Placement | None:
        """The placement that a load takes, None when it fits nowhere."""
        return next((placement for placement in self.placements if placement.fits), None)


@dataclass(frozen=True, slots=True)
class Lens:
    """A small artifact on one group's base."""

    id: str
    group_id: str
    kind: str
    transcoder_id: str | None
    extension_id: str | None
    artifact_uri: str | None
    activation_source_model_id: str | None
    base_digest: str | None
    layer: int | None
    size_bytes: int
    error_code: str | None
    error_message: str | None
    created_by: str
    created_at: datetime
    charge_bytes: int | None = None
    """Bytes on the device of the copy that serves, or where it is parked; None when it is nowhere."""
    parked: bool = False
    """Whether it is in host memory with its base, and not on a device."""

    @property
    def alters(self) -> bool:
        """Whether the model's outputs change while it is active."""
        return self.kind == "extension"


@dataclass(frozen=True, slots=True)
class Group:
    """One base and its lenses."""

    id: str
    name: str
    model_id: str
    active_lens_id: str | None
    created_by: str
    created_at: datetime
    exclusive: bool = False
    """Whether it wants a device alone: other models leave for it, and none comes beside it."""
    lenses: tuple[Lens, ...] = ()

    def lens(self, lens_id: str) -> Lens:
        """One of its lenses.

        Raises:
            NotFound: it has none of this id.
        """
        for lens in self.lenses:
            if lens.id == lens_id:
                return lens
        raise NotFound(f"Group {self.id} has no lens {lens_id}", metadata={"group_id": self.id, "lens_id": lens_id})


@dataclass(frozen=True, slots=True)
class LensArtifact:
    """Files of a lens, and what they were made for."""

    uri: str
    base_digest: str
    size_bytes: int
    model_id: str
    layer: int | None = None
    d_in: int | None = None
    activation_source_model_id: str = ""
    """Model whose activations the lens reads; its base when empty."""
