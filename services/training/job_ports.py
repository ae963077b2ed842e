"""What the two kinds of job need of the process they run in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from services.residency.families import Facts, Family
from services.training.dialogue import Judge, Live, Message, Saved, Split, Spread, Start, Written
from services.training.domain import Cache, Judged, NewTranscoder, Plan, Task, WantedEvaluation

T = TypeVar("T")
Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids, attention mask and the tokens whose activations count, all int64 [B, S]."""


class Extractions(Protocol):
    """The extraction service, as a job uses it."""

    async def start(self, model_id: str, dataset_id: str, plan: Plan, request_id: str) -> str:
        """Ask for the activations that a plan reads; the extraction's id. The same request gets the same one.

        Raises:
            errors.Invalid: a field is wrong.
        """

    async def finished(self, extraction_id: str) -> str:
        """Wait for an extraction; the id of its cache.

        Raises:
            errors.Failed: it has failed, with its reason, or was cancelled.
        """

    async def open(self, cache_id: str) -> Cache:
        """A cache, for a reader; counts as a use.

        Raises:
            errors.NotFound: it was deleted.
        """

    async def streamed(self, model_id: str, dataset_id: str, plan: Plan) -> Cache:
        """What a live stream for a plan would hold in one pass; the model is loaded for it.

        Raises:
            errors.LensmeshError: why there is no such stream.
        """

    def live(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> Live:
        """How the process finds that stream; its blocks come through `folder`, which is staged as a stream."""


class SplitModel(Protocol):
    """A model that a training is to split over its devices."""

    @property
    def cache(self) -> Cache:
        """What its rows would be in a cache, of one pass."""

    def over(self, devices: int, work_bytes: int) -> tuple[Split, int]:
        """Which part goes where, and the bytes of each device; the first has so many of the training's besides.

        Raises:
            errors.Failed: `MODEL_LOAD_FAILED`.
        """


class KnownModel(Protocol):
    """What is known of a model, wherever its weights are."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, None where it has none."""

    @property
    def facts(self) -> Facts:
        """What its config says."""

    @property
    def digest(self) -> str:
        """Content digest of its files."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""


class LaidOutModel(KnownModel, Protocol):
    """A model without its weights."""

    def over(self, devices: int, work_bytes: int) -> tuple[Spread, int]:
        """Which part goes where, and the bytes of each device; the first has so many of the work's besides.

        Raises:
            errors.Failed: `MODEL_LOAD_FAILED`.
        """


class Splits(Protocol):
    """Opens models that no device holds alone."""

    async def laid_out(self, model_id: str) -> LaidOutModel:
        """A model; no weight is read.

        Raises:
            errors.LensmeshError: why it cannot be read.
        """

    async def open(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> SplitModel:
        """A model, and a dataset's tokens in `folder`; no weight is read.

        Raises:
            errors.LensmeshError: why it cannot be read.
        """


class Ledger(Protocol):
    """The bytes of this process's device, and of others for a gang."""

    async def reserve(
        self,
        owner: str,
        size_bytes: int,
        ranks: int,
        *,
        waiting: Callable[[str | None], Awaitable[None]],
        uses: Sequence[str],
    ) -> list[str]:
        """Promise bytes on as many devices or on none; their names, as `gang.program` takes them.

        Idle models leave for them, but for those that the job `uses`; `waiting` is told who has the device alone.

        Raises:
            errors.Exhausted: `INSUFFICIENT_MEMORY`.
            errors.Unsupported: there are not so many devices.
        """

    async def release(self, owner: str) -> None:
        """Give them back; nothing happens when there are none."""


class Files(Protocol):
    """Published files of this host."""

    def reading(self, uri: str) -> AbstractAsyncContextManager[Path]:
        """A directory that is not deleted inside the block.

        Raises:
            errors.NotFound: it is not on this host.
            errors.Failed: `ARTIFACT_LOST`.
        """


class Child(Protocol):
    """A running training process."""

    async def next(self) -> Message:
        """The next progress, or the end.

        Raises:
            errors.Failed: `NON_FINITE_LOSS`, `CHECKSUM_MISMATCH`, or, transient, `TRAINING_FAILED`: it died.
            errors.Exhausted: `DEVICE_OOM`.
        """

    async def save(self, folder: Path) -> Saved | None:
        """Have a checkpoint written into an empty directory; None when no step is left."""

    async def write(self, folders: Mapping[str, Path], infos: Mapping[str, Mapping[str, Any]]) -> Written:
        """Have the transcoders written, by coder; it ends then."""


class Children(Protocol):
    """Starts training processes."""

    def start(self, start: Start | Judge) -> AbstractAsyncContextManager[Child]:
        """A process that lives no longer than the block."""


class Run(Protocol):
    """A claimed training: what it writes counts only while the claim is its own."""

    async def begin(self) -> Task:
        """What is to be done.

        Raises:
            errors.NotFound: the training was deleted.
        """

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, or `Interrupted` when the job is to stop."""

    async def waiting(self, reason: str | None) -> None:
        """Say what the job waits for, or that it goes on."""

    async def settle(self, plan: Plan, cache_id: str, step: int) -> None:
        """Keep what its data decided; history after `step` is of an attempt that is lost."""

    async def progress(self, percent: float, figures: Mapping[str, Any]) -> None:
        """Row, history and event."""

    async def finalizing(self) -> None:
        """From now on the job cannot be paused."""

    def staging(self, kind: str) -> AbstractContextManager[Path]:
        """An empty directory that can be published."""

    async def checkpointed(self, folder: Path, saved: Saved) -> None:
        """Publish a checkpoint, its row last; older ones than are to be kept are deleted."""

    async def publish(self, made: Sequence[tuple[NewTranscoder, Path]]) -> list[str]:
        """Make directories transcoders, all in one transaction; their ids. The checkpoints are of no more use."""


class LeasedModel(KnownModel, Protocol):
    """A model in this process, for the length of a job."""

    @property
    def model(self) -> nn.Module:
        """Touch it inside `run` only."""

    @property
    def family(self) -> Family:
        """Its module map."""

    @property
    def device(self) -> str:
        """Where it is."""

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """On the device's thread, with no altering lens in force."""


class Models(Protocol):
    """The models of this process."""

    async def bring(self, model_id: str) -> None:
        """Have a model loaded into this process.

        Raises:
            errors.LensmeshError: why it cannot be here.
        """

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LeasedModel]:
        """Hold a model that is here.

        Raises:
            errors.Unavailable: it left again.
        """


class HeldOut(Protocol):
    """Registered text as batches."""

    async def batches(self, wanted: WantedEvaluation, model: KnownModel, most: int) -> list[Batch]:
        """At most `most` batches of a dataset, the same ones each time.

        Raises:
            errors.Invalid: the dataset cannot be read, or has no usable row.
        """


class Judging(Protocol):
    """A claimed evaluation."""

    @property
    def job_id(self) -> str:
        """Of its job."""

    async def begin(self) -> tuple[WantedEvaluation, Judged]:
        """What is to be judged.

        Raises:
            errors.NotFound: the transcoder, or the checkpoint, was deleted.
        """

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`, or `Interrupted` when the job is to stop."""

    async def checkpoint(self) -> None:
        """Raises when the job is to stop, or the claim is lost."""

    async def waiting(self, reason: str | None) -> None:
        """Say what the job waits for, or that it goes on."""

    async def progress(self, percent: float, figures: Mapping[str, Any]) -> None:
        """Row and event."""

    def staging(self) -> AbstractContextManager[Path]:
        """An empty directory that can be published."""

    async def publish(self, figures: Mapping[str, Any], samples: Path | None = None) -> None:
        """Keep what was found, and a folder of feature samples of the transcoder with it."""
