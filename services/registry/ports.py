"""What the operations need from the outside: rows, host processes, other services, datasets on disk, a job's lease."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from services.kit.errors import LensmeshError
from services.kit.requests import RequestKey
from services.registry.dataset_ports import DatasetRows
from services.registry.domain import (
    Facts,
    Group,
    Host,
    HostedModel,
    Lens,
    LensArtifact,
    Load,
    Model,
    Need,
    Residency,
    Source,
)
from services.registry.figures import Counted
from services.registry.habits import Place
from services.registry.listing import Listed, Page

T = TypeVar("T")


class ModelRows(Protocol):
    """The catalogue of models, within one transaction."""

    async def insert(self, row: Mapping[str, Any]) -> Model:
        """Add a model."""

    async def get(self, model_id: str, *, lock: bool = False) -> Model:
        """One model, locked until the transaction ends when asked.

        Raises:
            NotFound: `MODEL_NOT_FOUND`.
        """

    async def page(self, page: Page, *, status: str | None, model_type: str | None) -> Listed:
        """Models, newest first."""

    async def update(self, model_id: str, **columns: Any) -> Model:
        """Set columns; `updated_at` follows."""

    async def append_perplexity(self, model_id: str, result: Mapping[str, Any]) -> None:
        """Keep a measurement."""

    async def unquantized_perplexity(self, digest: str, dataset_id: str, tokens: int) -> float | None:
        """The last one measured with these files, without quantization, on the same tokens of a dataset."""

    async def to_restore(self) -> list[str]:
        """Ids of models that are wanted on a device and are nowhere."""

    async def want_preloaded(self, silence_seconds: float) -> None:
        """When no host was heard for that long the whole mesh starts: want what is marked for preload, only."""

    async def delete(self, model_id: str) -> None:
        """Remove the row."""

    async def sharers(self, model_id: str) -> int:
        """How many other models have the same files."""

    async def users(self, model_id: str) -> list[str]:
        """Groups and unfinished jobs that use it, as `kind id`."""

    async def measured(self, model_id: str, quantization: str) -> tuple[int | None, float | None]:
        """Bytes and seconds of its last good load."""

    async def load_speed(self) -> float | None:
        """Bytes per second over the latest good loads of any model."""

    async def loads_within_hour(self, subject: str) -> tuple[int, float]:
        """Loads that a user started, and the seconds until the oldest of them no longer counts; locks the user."""

    async def start_load(self, load_id: str, **columns: Any) -> None:
        """Write down a load that was accepted."""

    async def end_load(
        self,
        load_id: str,
        outcome: str,
        *,
        memory_bytes: int | None = None,
        seconds: float | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Write down how it ended."""

    async def find_load(self, load_id: str) -> Load | None:
        """A load that was accepted."""

    async def abandoned_loads(self) -> list[str]:
        """Loads that count as running although their jobs have ended."""


class PlacementRows(Protocol):
    """Hosts, what is on them, and their ledgers, within one transaction."""

    async def register(self, facts: Mapping[str, Any]) -> str | None:
        """Write a host down; its former incarnation, None for a new host."""

    async def drop_reservations(self, host_id: str) -> None:
        """Forget what a host has reserved, wherever."""

    async def heartbeat(self, host_id: str, incarnation: str, **columns: Any) -> bool:
        """Write a sign of life down; false when the registry does not know this incarnation as alive."""

    async def hosts(self, *, lock: bool = False) -> list[Host]:
        """Live hosts with ledgers and residents; locked in order of their ids when asked."""

    async def all_hosts(self) -> list[Host]:
        """Lost ones too, by name."""

    async def lock_host(self, host_id: str) -> Host:
        """One host with its ledger, locked.

        Raises:
            NotFound: there is none.
            Unavailable: `NO_HOST`: it is lost.
        """

    async def silent(self, seconds: float) -> list[str]:
        """Ids of hosts, not yet lost, that were not heard for that long; locked."""

    async def lose(self, host_id: str) -> list[Residency]:
        """Mark a host as lost, forget its reservations; what was on it."""

    async def of_model(self, model_id: str) -> list[Residency]:
        """Where a model is on live hosts or was on lost ones, the copy that serves first."""

    async def of_host(self, host_id: str) -> list[Residency]:
        """Everything that the rows say is in a host process."""

    async def of_job(self, job_id: str) -> list[Residency]:
        """What a load holds: the model that loads, and those that leave for it."""

    async def forget_ended_preloads(self) -> None:
        """Models that came to host memory for a job that has ended without them are not there."""

    async def revert_unloads(self) -> None:
        """Models that a registry was unloading when it died count as resident again, until their hosts say more."""

    async def put(self, model_id: str, host_id: str, **columns: Any) -> None:
        """Write a residency, replacing the one that was there."""

    async def change(self, model_id: str, host_id: str, **columns: Any) -> None:
        """Set columns of a residency."""

    async def arrived(self, model_id: str, host_id: str) -> datetime:
        """The copy is resident from now on; one that was there already keeps its time."""

    async def touch(self, model_id: str, host_id: str) -> None:
        """The copy is used now."""

    async def use(self, host_id: str, seen: Sequence[HostedModel]) -> None:
        """Leases and last use of the models and lenses of a host, and the active lens, as it reports them."""

    async def touch_lenses(self, host_id: str, lens_ids: Sequence[str]) -> None:
        """Lenses are used now."""

    async def lens_leaves(self, host_id: str, lens_id: str, job_id: str | None, *, parked: bool) -> None:
        """A lens makes room from now on: for a load, or for another lens when there is no job."""

    async def lens_stays(self, host_id: str, lens_id: str, leases: int | None = None) -> None:
        """A lens stays where it is after all, because of so many leases when they are known."""

    async def lenses_stay(self, job_id: str) -> None:
        """The lenses that were to make room for a load stay."""

    async def charge(self, job_id: str, host_id: str, size: int) -> None:
        """The model of a load holds so many bytes more, at most what it needs."""

    async def remove(self, model_id: str, host_id: str) -> bool:
        """Forget a residency; whether there was one."""

    async def reserve(self, host_id: str, owner: str, size: int, *, holder_id: str) -> None:
        """Write a reservation of a host's bytes that another host, or the same, is to give back."""

    async def gain(self, host_id: str, owner: str, size: int, most: int) -> None:
        """What is reserved of a host for an owner is so many bytes more, at most `most`."""

    async def release(self, holder_id: str, owner: str) -> None:
        """Forget what a host has reserved for an owner, wherever."""

    async def fingerprint(self, model_id: str, host_id: str, quantization: str, incarnation: str) -> str:
        """What the model's fixed-input forward gave in this life of the host; empty when it was not loaded there."""

    async def keep_fingerprint(
        self, model_id: str, host_id: str, quantization: str, incarnation: str, fingerprint: str
    ) -> None:
        """Remember it."""


class GroupRows(Protocol):
    """Groups and lenses, within one transaction."""

    async def insert(self, row: Mapping[str, Any]) -> Group:
        """Add a group."""

    async def get(self, group_id: str, *, lock: bool = False) -> Group:
        """One group with its lenses.

        Raises:
            NotFound: there is none.
        """

    async def page(self, page: Page, *, model_id: str | None) -> Listed:
        """Groups, newest first."""

    async def delete(self, group_id: str) -> None:
        """Remove a group and its lenses."""

    async def of_model(self, model_id: str) -> list[Group]:
        """Groups of a base."""

    async def lock_of_model(self, model_id: str) -> None:
        """Lock the groups of a base until the transaction ends, so that switches on one base take turns."""

    async def add_lens(self, row: Mapping[str, Any]) -> Lens:
        """Add a lens to its group."""

    async def lens_failed(self, lens_id: str, code: str | None, message: str | None) -> None:
        """Why it could not be attached; None when it is."""

    async def retarget_lens(self, lens_id: str, artifact_uri: str) -> None:
        """Its files are others now."""

    async def remove_lens(self, lens_id: str) -> None:
        """Forget a lens and where it was; a group in which it was active has none active."""

    async def place_lens(self, lens_id: str, model_id: str, host_id: str, size: int, state: str = "here") -> None:
        """A lens is on a device, or coming, and costs so many bytes."""

    async def charge_lens(self, lens_id: str, host_id: str, size: int, most: int) -> None:
        """A lens that is about to be on a device holds so many bytes more, at most what it needs."""

    async def displace_lens(self, lens_id: str, host_id: str) -> None:
        """A lens is off a device."""

    async def lens_parked(self, lens_id: str, host_id: str) -> None:
        """A lens has left a device for host memory."""

    async def exclusive(self, model_id: str) -> bool:
        """Whether a group of a base wants the device alone."""

    async def begin_turn(self, model_id: str, lens_ids: Sequence[str]) -> dict[str, set[str]]:
        """Lock the groups of a base; which of the lenses each of them has, by group."""

    async def end_turn(self, model_id: str, done: Sequence[tuple[str, str | None, str, float]]) -> None:
        """Switches happened one after another, each of a group, to a lens, of a kind, in so many seconds.

        The last lens of a group is active in it, and of altering lenses only one that came last of all.
        """

    async def activate_extension(self, model_id: str, extension_id: str | None) -> None:
        """An extension was activated on its base: groups that hold it show it, others show no altering lens."""

    async def record_switch(self, group_id: str, kind: str, seconds: float) -> None:
        """Keep a measurement."""

    async def switch_seconds(self, group_id: str, kind: str) -> float | None:
        """Mean of the last switches of a kind, of this group or else of all."""


class HabitRows(Protocol):
    """What users switch to after what, within one transaction."""

    async def keep(self, steps: Mapping[tuple[str, Place, Place], int]) -> None:
        """Count steps of users; those from or to a group that is gone are left out."""

    async def likely(self, subject: str, here: Place) -> Place | None:
        """Where a user is likely to go next."""

    async def preloading(self, group_id: str) -> bool:
        """Whether a preload of a group is under way."""


class Answered(Protocol):
    """A call that may be a repetition."""

    answer: dict[str, Any] | None
    """The first answer of a repetition; else None until the block sets it."""


class Transaction(Protocol):
    """All rows in one transaction, and what is written with them."""

    @property
    def models(self) -> ModelRows:
        """The catalogue of models."""

    @property
    def placement(self) -> PlacementRows:
        """Hosts and what is on them."""

    @property
    def groups(self) -> GroupRows:
        """Groups and lenses."""

    @property
    def habits(self) -> HabitRows:
        """What users switch to after what."""

    @property
    def datasets(self) -> DatasetRows:
        """Datasets."""

    async def emit(self, event: str, resource_id: str, data: Mapping[str, Any]) -> None:
        """Write an event that exists exactly if the transaction commits."""

    async def emit_all(self, told: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Write events, each a name, a resource and facts, in this order."""

    async def enqueue_load(self, job_id: str, model: Model, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that loads a model."""

    def once(self, request: RequestKey) -> AbstractAsyncContextManager[Answered]:
        """Do the block once per request id; a repetition finds its first answer.

        Raises:
            Conflict: `REQUEST_ID_REUSED`.
        """

    async def enqueue_preload(self, job_id: str, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that preloads a group."""

    async def enqueue_switch(self, job_id: str, payload: Mapping[str, Any], subject: str) -> None:
        """Queue the job that switches to another group, behind those of users who have fewer waiting.

        Jobs whose payloads name the same `host_id` take turns.
        """

    async def switch_turns(self, host_id: str) -> Sequence[Turn]:
        """Switches of a host that run or wait, the next one first."""

    async def job_outcome(self, job_id: str) -> tuple[str, LensmeshError]:
        """A job's state, and why it failed or was cancelled, when it did."""

    async def counted(self) -> Counted:
        """Figures for metrics."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A switch between groups that runs or waits."""

    job_id: str
    group_id: str
    lens_id: str | None
    position: int
    """Its place; 1 is next or running."""


class Store(Protocol):
    """The database."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """All of it or nothing."""


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One message of a load that goes on."""

    percent: float
    bytes_done: int
    bytes_total: int
    message: str
    model: HostedModel | None = None
    """The loaded model; only in the last one."""
    seconds: float = 0.0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Switched:
    """What a lens switch did on its host."""

    seconds: float
    memory_before_bytes: int
    memory_after_bytes: int


class ModelHosts(Protocol):
    """The host processes, by gRPC address. Errors of a host are raised as it raised them."""

    async def inspect(self, address: str, source: Source) -> Facts:
        """What a model's files hold."""

    async def estimate(self, address: str, source: Source, quantization: str) -> Need:
        """What a load would need."""

    def load(
        self,
        address: str,
        model_id: str,
        source: Source,
        quantization: str,
        *,
        digest: str,
        fingerprint: str,
        parked: bool = False,
    ) -> AsyncGenerator[LoadStep]:
        """Load, onto the device or into host memory; ending the iteration early stops it and leaves nothing behind."""

    async def unload(self, address: str, model_id: str, wait_seconds: float) -> int:
        """Take a model off; bytes that came back.

        Raises:
            Conflict: `IN_USE`: leases are held.
        """

    async def park(self, address: str, model_id: str) -> int:
        """Move a model and its lenses to host memory; bytes that the device got back.

        Raises:
            Conflict: `IN_USE`: leases are held.
            Exhausted: host memory has no room for it.
        """

    async def restore(self, address: str, model_id: str) -> HostedModel:
        """Move a parked model back."""

    async def attach_lens(
        self, address: str, model_id: str, lens_id: str, kind: str, artifact: LensArtifact, *, parked: bool = False
    ) -> int:
        """Bring a lens to a resident model, or to a parked one; its bytes there."""

    async def detach_lens(self, address: str, model_id: str, lens_id: str, *, park: bool = False) -> None:
        """Take a lens off, to park it or for good."""

    async def switch_lens(self, address: str, model_id: str, lens_id: str | None) -> Switched:
        """Make a lens the active one."""

    async def analyze(self, address: str, model_id: str, lens_ids: Sequence[str], query: Mapping[str, Any]) -> Any:
        """Read a text through lenses; the answer as the wire has it."""

    async def generate(
        self, address: str, model_id: str, query: Any, extension: tuple[str, LensArtifact] | None
    ) -> Any:
        """Continue a prompt; the answer as the wire has it."""

    async def measure_perplexity(
        self, address: str, model_id: str, dataset_id: str, sample_count: int, max_length: int
    ) -> dict[str, Any]:
        """Perplexity on a dataset, the fields of PerplexityResult."""

    async def forget(self, address: str, source: Source, digest: str) -> None:
        """Delete what the host's disk keeps of a model: its download, and what was quantised from its files."""

    async def empty_cache(self, address: str) -> int:
        """Empty the allocator's cache; bytes that came back."""

    async def state(self, address: str) -> tuple[str, list[HostedModel]]:
        """The process's incarnation and everything on its device, now."""


class Peers(Protocol):
    """The other services, found through the hosts that announce them."""

    async def transcoder(self, transcoder_id: str) -> LensArtifact:
        """A transcoder's files.

        Raises:
            NotFound: there is none.
            Unavailable: `NO_HOST`: no host serves training.
        """

    async def extension(self, extension_id: str) -> LensArtifact:
        """An extension's files; the same errors."""

    async def users_of_model(self, model_id: str) -> list[str]:
        """Transcoders, extensions and activation caches of a model, as `kind id`."""

    async def delete_users_of_model(self, model_id: str) -> None:
        """Delete them."""
