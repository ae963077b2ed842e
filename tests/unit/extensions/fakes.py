"""Small stand-ins for the ports of the extension service; the base is a real tiny GPT-2."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from services.kit import errors
from services.kit.paging import Page
from services.kit.requests import RequestKey
from services.residency.lenses.extension import Extensions
from tests.models import TEXTS, tiny, tokenizer

KEY = RequestKey("ada", "CreateExtension", "", b"")
MODEL = "m_tiny"


class Stopped(Exception):
    """The job was asked to stop."""


@dataclass
class FakeStore:
    """Files below a directory, rows in a dict."""

    root: Path
    rows: dict[str, Extension] = field(default_factory=dict)
    queued: list[NewTraining] = field(default_factory=list)
    folders: int = 0

    def new_id(self) -> str:
        return f"x_{len(self.rows) + 1}"

    def put(self, write: Callable[[Path], None]) -> str:
        self.folders += 1
        uri = f"artifact://test/{self.folders}"
        (self.root / str(self.folders)).mkdir()
        write(self.root / str(self.folders))
        return uri

    def path(self, uri: str) -> Path:
        return self.root / uri.rpartition("/")[2]

    async def insert(self, extension: Extension, write: Callable[[Path], None], key: RequestKey) -> Extension:
        self.rows[extension.id] = replace(extension, artifact_uri=self.put(write))
        return self.rows[extension.id]

    async def get(self, extension_id: str) -> Extension:
        if extension_id not in self.rows:
            raise errors.NotFound
        return self.rows[extension_id]

    async def list(self, wanted: Filter) -> Page:
        return Page(tuple(self.rows.values()), len(self.rows), wanted.limit, wanted.offset, "")

    async def delete(self, extension_id: str) -> None:
        del self.rows[extension_id]

    async def enqueue(self, training: NewTraining, key: RequestKey) -> str:
        self.queued.append(training)
        return "job_1"

    async def sharers(self, extension: Extension) -> list[Sharer]:
        return []

    async def enqueue_merge(self, extension_id: str, name: str, key: RequestKey) -> str:
        return "job_2"

    @asynccontextmanager
    async def reading(self, artifact_uri: str) -> AsyncIterator[Path]:
        yield self.path(artifact_uri)


@dataclass
class FakeCatalogue:
    """One model, and what is active on it."""

    active: set[str] = field(default_factory=set)
    lenses: list[str] = field(default_factory=list)
    reserved: dict[str, int] = field(default_factory=dict)
    most_reserved: int = 0
    quantization: str = "none"

    async def model(self, model_id: str) -> BaseModel:
        model = tiny("gpt2", 2)
        count = sum(parameter.numel() for parameter in model.parameters())
        return BaseModel(model_id, "gpt2", model.config.to_dict(), count, "digest-of-tiny", "tiny", self.quantization)

    async def register(self, name: str, digest: str, request_id: str) -> str:
        return f"m_{digest}"

    async def active_extensions(self, model_ids: set[str]) -> set[str]:
        return self.active if MODEL in model_ids else set()

    async def lenses_of(self, extension: Extension) -> list[str]:
        return self.lenses

    async def take_off(self, extension: Extension) -> None:
        self.active -= {extension.id}

    async def switch(self, extension: Extension, active: bool) -> Switch:
        self.active = {extension.id} if active else set()
        return Switch(0.001, 10, 20, extension.id if active else "")

    async def generate(self, extension: Extension, prompt: Prompt) -> Generated:
        return Generated(prompt.text, tuple(range(prompt.max_new_tokens)), 0.1)

    async def generate_together(self, asked: Sequence[tuple[Extension, Prompt]]) -> list[Generated]:
        return [await self.generate(extension, prompt) for extension, prompt in asked]

    async def generate_stream(self, extension: Extension, prompt: Prompt) -> AsyncGenerator[Generated, None]:
        for token in range(prompt.max_new_tokens):
            yield Generated(prompt.text, (token,), 0.1)

    async def reserve(self, owner: str, size_bytes: int, ranks: int = 1, **more: Any) -> list[str]:
        self.reserved[owner] = size_bytes
        self.most_reserved = max(self.most_reserved, size_bytes)
        return ["cpu"] * ranks

    async def release(self, owner: str) -> None:
        self.reserved.pop(owner, None)


class FakeBase:
    """A base whose device thread is the test's own."""

    def __init__(self) -> None:
        self.model: Any = tiny("gpt2", 2)
        self.tokenizer: Any = tokenizer()
        self.digest = "digest-of-tiny"
        self.directory, self.quantization, self.nbytes = Path("/nowhere"), "none", 0
        self.attached = Extensions()

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        with self.attached.using(None):
            return work(*arguments)


@dataclass
class FakeBases:
    """The base, once it is asked for."""

    base: FakeBase | None = None
    leases: int = 0

    @asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[FakeBase]:
        self.base = self.base or FakeBase()
        self.leases += 1
        try:
            yield self.base
        finally:
            self.leases -= 1


@dataclass
class FakeDatasets:
    """Datasets by id."""

    known: dict[str, Documents] = field(default_factory=dict)

    async def paired(self, dataset_id: str) -> bool:
        return bool(self.known[dataset_id].pairs) if dataset_id in self.known else False

    async def documents(self, field: str, dataset_id: str, tokenizer: Any, vocab_size: int) -> Documents:
        if dataset_id not in self.known:
            raise errors.NotFound
        return self.known[dataset_id]


def documents(count: int = 12) -> Documents:
    """Real text, some of it several times."""
    encode = tokenizer()
    return Documents(texts=tuple(encode(TEXTS[index % len(TEXTS)])["input_ids"] for index in range(count)))


@dataclass
class FakeRun:
    """A claim in memory; stops after `stop_after` steps."""

    store: FakeStore
    state: Training
    job_id: str = "job_1"
    stop_after: int | None = None
    on_progress: Callable[[dict[str, Any]], None] = lambda figures: None
    told: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    saves: int = 0

    @property
    def stopping(self) -> bool:
        return self.stop_after is not None and self.steps >= self.stop_after

    async def training(self) -> Training:
        return self.state

    async def checkpoint(self) -> None:
        if self.stopping:
            raise Stopped
        self.steps += 1

    async def unless_stopped(self, work: Any) -> Any:
        return await work

    async def waiting(self, reason: str | None) -> None:
        pass

    async def progress(self, percent: float, figures: dict[str, Any]) -> None:
        self.told.append({"percent": percent, **figures})
        self.on_progress(figures)

    async def begun(self, loss_before: float) -> None:
        self.state = replace(self.state, loss_before=loss_before)

    async def finalizing(self) -> None:
        pass

    async def save(self, write: Callable[[Path], None]) -> None:
        self.saves += 1
        self.state = replace(self.state, checkpoint_uri=self.store.put(write))

    async def publish(self, write: Callable[[Path], None]) -> str:
        return self.store.put(write).rpartition("/")[2]

    async def finish(
        self, result: TrainedExtension, write: Callable[[Path], None] | None, sharers: Sequence[Sharer] = ()
    ) -> None:
        if write is None:
            self.state = replace(self.state, result=result.as_dict())
            return
        self.state = replace(self.state, result=result.as_dict(), artifact_uri=self.store.put(write))
