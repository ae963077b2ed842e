"""What the extension service needs of others, as it sees them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from services.extensions.domain import (
    BaseModel,
    Documents,
    Extension,
    Filter,
    Generated,
    NewTraining,
    Prompt,
    Sharer,
    Switch,
    TrainedExtension,
    Training,
)
from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.residency.lenses.extension import Extensions

T = TypeVar("T")


class Store(Protocol):
    """Extensions, their files and their trainings."""

    def new_id(self) -> str:
        """An id for a new extension."""

    async def insert(self, extension: Extension, write: Callable[[Path], None], key: RequestKey) -> Extension:
        """Publish what `write` puts into an empty folder, and the row, in one transaction.

        Raises:
            Conflict: the request id came before with another request.
        """

    async def get(self, extension_id: str) -> Extension:
        """One extension.

        Raises:
            NotFound: there is none.
        """

    async def list(self, wanted: Filter) -> Page:
        """A page of extensions."""

    async def delete(self, extension_id: str) -> None:
        """Delete an extension and all versions of its files.

        Raises:
            NotFound: there is none.
            Conflict: it is being trained.
        """

    async def enqueue(self, training: NewTraining, key: RequestKey) -> str:
        """Queue a training; its job's id.

        Raises:
            NotFound: there is no such extension.
            Conflict: it is being trained already, or the request id came before with another request.
        """

    async def sharers(self, extension: Extension) -> Sequence[Sharer]:
        """The other extensions that compute with the same layers."""

    async def enqueue_merge(self, extension_id: str, name: str, key: RequestKey) -> str:
        """Queue a merge into a model of this name; its job's id.

        Raises:
            NotFound: there is no such extension.
            Conflict: it is being trained, or the request id came before with another request.
        """

    def reading(self, artifact_uri: str) -> AbstractAsyncContextManager[Path]:
        """The files of an artifact, kept while the block reads them.

        Raises:
            NotFound: they are gone.
        """


class JobRun(Protocol):
    """One claim of a job: whatever it writes counts only while the claim is the current one."""

    @property
    def job_id(self) -> str:
        """The job's id."""

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the job is to stop."""

    async def waiting(self, reason: str | None) -> None:
        """Say what the run waits for."""

    async def publish(self, write: Callable[[Path], None]) -> str:
        """Keep a model's files; their digest, which is where the registry finds them."""


class Run(JobRun, Protocol):
    """One claim of a training job."""

    @property
    def stopping(self) -> bool:
        """Whether the next `checkpoint` will raise: save first."""

    async def training(self) -> Training:
        """What to train, and where to go on."""

    async def checkpoint(self) -> None:
        """Between steps; raises when the job is to stop."""

    async def progress(self, percent: float, figures: dict[str, Any]) -> None:
        """Say how far it is, with the event `extension:progress`."""

    async def begun(self, loss_before: float) -> None:
        """Keep the held-out loss that the training starts from."""

    async def finalizing(self) -> None:
        """Say that the result is being made."""

    async def save(self, write: Callable[[Path], None]) -> None:
        """Keep a state to resume from, instead of the former one."""

    async def finish(
        self, result: TrainedExtension, write: Callable[[Path], None] | None, sharers: Sequence[Sharer] = ()
    ) -> None:
        """Publish the trained weights as the extension's newest version, and its layers as those of the sharers.

        Without `write` the weights are in a new model, and the extension stays as it was.
        """


class MergeRun(JobRun, Protocol):
    """One claim of a merge."""

    @property
    def name(self) -> str:
        """What the new model shall be called."""

    async def extension(self) -> Extension:
        """What to merge.

        Raises:
            NotFound: it was deleted.
        """


class Catalogue(Protocol):
    """The registry, and the hosts it knows."""

    async def model(self, model_id: str) -> BaseModel:
        """A registered base.

        Raises:
            NotFound: there is none.
            Conflict: its files were never read, so nothing is known about it.
        """

    async def register(self, name: str, digest: str, request_id: str) -> str:
        """Register a model whose files were published; its id, the same for the same request id."""

    async def active_extensions(self, model_ids: set[str]) -> set[str]:
        """Extensions that are the active lens of one of these bases."""

    async def lenses_of(self, extension: Extension) -> list[str]:
        """Ids of the lenses that use an extension."""

    async def take_off(self, extension: Extension) -> None:
        """Deactivate it and have its base's host forget it; nothing to do where it is not attached.

        Raises:
            Conflict: `IN_USE`: a call uses it.
        """

    async def switch(self, extension: Extension, active: bool) -> Switch:
        """Make an extension the active lens of its base, or the base alone."""

    async def generate(self, extension: Extension, prompt: Prompt) -> Generated:
        """Continue a prompt on the host that has the base."""

    async def generate_together(self, asked: Sequence[tuple[Extension, Prompt]]) -> Sequence[Generated]:
        """Continue prompts with extensions of one base in the same forward passes."""

    def generate_stream(self, extension: Extension, prompt: Prompt) -> AsyncGenerator[Generated, None]:
        """The same, each part what came since the last one; closing it ends the generation."""


class Ledger(Protocol):
    """Bytes of this process's device."""

    async def reserve(
        self,
        owner: str,
        size_bytes: int,
        ranks: int = 1,
        *,
        waiting: Callable[[str | None], Awaitable[None]],
        uses: Sequence[str],
    ) -> Sequence[str]:
        """Set bytes aside for each of so many processes before they are allocated, all or none.

        Idle models leave for them, but for those that the job `uses`; `waiting` is told who has the device alone.

        Returns:
            The device of each, as `gang.program` takes it.

        Raises:
            Exhausted: there is no room.
            Unsupported: the machine has fewer devices.
        """

    async def release(self, owner: str) -> None:
        """Give reserved bytes back."""


class Base(Protocol):
    """A base under lease in this process."""

    model: Any
    """The Hugging Face module, in eval mode."""
    tokenizer: Any
    digest: str
    """Content digest of the base's files."""
    directory: Path
    """The base's files."""
    quantization: str
    nbytes: int
    """Bytes of its weights in memory."""
    attached: Extensions
    """What is attached to it; only inside `run`."""

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do torch work on the device's thread, the base bare at its start; others get their turn before the next."""


class Bases(Protocol):
    """The residency pool of this process."""

    def lease(self, model_id: str) -> AbstractAsyncContextManager[Base]:
        """Bring a base to this process if it is not there, and keep it while the block runs."""


class Datasets(Protocol):
    """Reads registered text."""

    async def paired(self, dataset_id: str) -> bool:
        """Whether its rows are registered as prompts and targets.

        Raises:
            NotFound: there is no such dataset.
        """

    async def documents(self, field: str, dataset_id: str, tokenizer: Any, vocab_size: int) -> Documents:
        """The usable rows of a dataset, tokenised.

        Raises:
            NotFound: there is no such dataset.
            Invalid: it cannot be read, or holds nothing usable; names `field`.
        """
