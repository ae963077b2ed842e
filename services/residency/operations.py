"""What the registry may ask of this process: one function per rpc, in our own types."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database
from services.residency import custom, estimate, loading, reading, sources, texts
from services.residency.catalogue import Catalogue
from services.residency.config import ResidencySettings
from services.residency.disk_cache import DiskCache
from services.residency.failures import out_of_memory
from services.residency.generation import TURN, Continuation
from services.residency.guests import Guests
from services.residency.intervention import Intervention, splices
from services.residency.lease import Lease
from services.residency.lenses import Reading, Spec
from services.residency.lenses import load as load_lens
from services.residency.lenses.mixed import mixable
from services.residency.memory import give_back
from services.residency.metrics import ResidencyMetrics
from services.residency.perplexity import Perplexity, batch_loss, perplexity
from services.residency.pool import Pool
from services.residency.resident import Attached, Resident
from services.residency.splice import Splice
from services.residency.together import Together

T = TypeVar("T")
MADE = "model"
"""Kind of artifact that a model is which a job made."""
LOCAL = "local:"
"""Before the path, below a model root, of a folder that is no artifact of ours: a tuned lens that somebody brings."""
UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""
PERPLEXITY_TOKENS = 1024
"""Most tokens of a sequence that perplexity is measured on when the request leaves it open."""


@dataclass(frozen=True, slots=True)
class Loading:
    """One step of a load; the last one carries the model."""

    done: int
    total: int
    """Bytes, those of a download and those that are then read from the disk."""
    resident: Resident | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Analysis:
    """A text's tokens, and what each lens reads in it."""

    token_ids: list[int]
    readings: list[tuple[Spec, Reading]]
    seconds: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A text that somebody wants to be read: `text` or `token_ids`."""

    text: str
    token_ids: Sequence[int]
    top_k: int
    prefix: int
    """Groups of a dictionary to use; all when 0."""
    interventions: Sequence[Intervention] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A continuation that somebody asks for."""

    model_id: str
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    extension: tuple[Spec, str] | None
    """A lens and its artifact."""
    interventions: Sequence[Intervention]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model added to a prompt."""

    token_ids: list[int]
    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A perplexity, over how many sequences, and the seconds it took."""

    result: Perplexity
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Host:
    """The pool and what it is served with."""

    pool: Pool
    settings: ResidencySettings
    database: Database
    artifacts: ArtifactStore
    catalogue: Catalogue
    disk_cache: DiskCache
    metrics: ResidencyMetrics
    guests: Guests
    custom_classes: frozenset[str] = frozenset()
    """Names of the classes that custom models may be of."""

    @property
    def model_roots(self) -> list[Path]:
        """Where local models lie; last the models that were made here, whose identifier is their digest."""
        return [*self.settings.model_roots, self.artifacts.root / MADE]

    @property
    def hub_dir(self) -> Path:
        """Where downloaded hub models are kept."""
        return self.settings.state_dir / "hub"

    async def forget_made(self, identifier: str) -> None:
        """Delete the files of a model that was made here; those below the configured roots are their owner's.

        Raises:
            errors.Conflict: `IN_USE`: somebody reads them.
        """
        if not any((root / identifier).exists() for root in self.settings.model_roots):
            with suppress(errors.NotFound):
                await self.artifacts.delete(self.database, f"artifact://{MADE}/{identifier}")

    async def inspect(self, source: sources.Source) -> sources.Contents:
        """Config, headers and digest of a model's files."""
        found = await self.pool.read(sources.inspect, source, self.model_roots, self.hub_dir)
        if source.kind == "custom":
            custom.check(found.config, self.custom_classes)
        return found

    async def estimate(self, source: sources.Source, quantization: str) -> estimate.Estimate:
        """What a load would need."""
        found = await self.inspect(source)
        config = loading.config_of(found.config)
        return await self.pool.run(estimate.estimate, config, found.entries, quantization, self.pool.device)

    async def load(
        self,
        model_id: str,
        source: sources.Source,
        quantization: str,
        *,
        digest: str,
        fingerprint: str,
        parked: bool = False,
    ) -> AsyncIterator[Loading]:
        """Load a model, onto the device or `parked`, telling how far it is; ending the iteration early ends the load.

        Raises:
            errors.LensmeshError: see `Pool.load`.
        """
        start = time.perf_counter()
        steps: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ended = threading.Event()
        fetched = 0

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, (fetched + done, fetched + total))

        def tell_download(done: int, total: int) -> None:
            nonlocal fetched
            if ended.is_set():
                raise errors.Conflict("the load was given up", reason="CANCELLED")
            loop.call_soon_threadsafe(steps.put_nowait, (done, 2 * total))  # what is downloaded is then read
            fetched = done

        async def work() -> Resident:
            try:
                found = await self.pool.read(sources.fetch, source, self.model_roots, self.hub_dir, tell_download)
                if source.kind == "huggingface":
                    await self.pool.read(self.disk_cache.use, found)
                return await self.pool.load(
                    model_id,
                    found,
                    quantization,
                    expected_digest=digest,
                    expected_fingerprint=fingerprint,
                    parked=parked,
                    progress=tell,
                )
            finally:
                steps.put_nowait(None)

        task = asyncio.create_task(work())
        done, total = 0, 0
        try:
            while (step := await steps.get()) is not None:
                done, total = step
                yield Loading(done, total)
            resident = await task
        except errors.LensmeshError as error:
            self.metrics.load_failed(error.reason)
            raise
        finally:
            ended.set()
            task.cancel()
            await asyncio.wait([task])
        seconds = time.perf_counter() - start
        self.metrics.loaded(quantization, seconds)
        yield Loading(total, total, resident, seconds)

    @asynccontextmanager
    async def _files(self, artifact_uri: str) -> AsyncIterator[Path | None]:
        """The directory behind an artifact's handle, kept while the block reads it; None for kinds without files."""
        if not artifact_uri:
            yield None
            return
        if artifact_uri.startswith(LOCAL):
            yield await self.pool.read(self._brought, artifact_uri.removeprefix(LOCAL))
            return
        async with self.artifacts.reading(self.database, artifact_uri) as folder:
            yield folder

    def _brought(self, path: str) -> Path:
        try:
            return sources.find_local(path, self.settings.model_roots)
        except sources.SourceNotFound as error:
            raise errors.Invalid.of("artifact_uri", str(error)) from error

    async def attach(self, model_id: str, spec: Spec, artifact_uri: str, *, parked: bool) -> None:
        """Bring a lens to a resident model, or to a parked one."""
        await self._bring(model_id, spec, artifact_uri, parked=parked)
        self.guests.keep(model_id, spec.lens_id)

    async def _bring(self, model_id: str, spec: Spec, artifact_uri: str, *, parked: bool = False) -> None:
        """From host memory where it is parked there, else from its files."""
        stowed = self.pool.get(model_id).parked.get(spec.lens_id)
        if stowed is not None and stowed.spec == replace(spec, folder=stowed.spec.folder):
            await self.pool.attach(model_id, stowed.spec, parked=parked)
            return
        async with self._files(artifact_uri) as folder:
            await self.pool.attach(model_id, replace(spec, folder=folder), parked=parked)

    async def switch(self, model_id: str, lens_id: str | None) -> float:
        """Make a lens the active one, or the base alone; returns seconds."""
        with self.metrics.watching():
            seconds = await self.pool.switch(model_id, lens_id)
        self.metrics.switched(seconds)
        return seconds

    async def making_room(self, model_id: str, forward: Callable[[], Awaitable[T]]) -> T:
        """What a forward on a model gives; once memory has run out, after all that is idle on the device has left.

        Raises:
            errors.Exhausted: `INSUFFICIENT_MEMORY`: that did not help.
        """
        try:
            return await forward()
        except errors.Exhausted as error:
            if error.reason not in ("DEVICE_OOM", "INSUFFICIENT_MEMORY"):
                raise
        reads = {attached.spec.source_model_id for attached in self.pool.get(model_id).lenses.values()}
        await self.catalogue.make_room({model_id, *reads} - {""})
        try:
            return await forward()
        except errors.Exhausted as error:
            if error.reason != "DEVICE_OOM":
                raise
            raise out_of_memory(self.pool.free_bytes) from error

    async def analyze(self, model_id: str, lens_ids: Sequence[str], asked: Asked) -> Analysis:
        """Read a text through attached lenses.

        Raises:
            errors.NotFound: a lens is not attached.
            errors.Invalid: the text, the prefix or an intervention does not fit.
            errors.Unsupported: there are interventions, and the model has no hook points.
        """
        start = time.perf_counter()
        async with AsyncExitStack() as stack:
            lease = await stack.enter_async_context(self.pool.lease(model_id))
            attached = lease.record.lenses
            missing = [lens_id for lens_id in lens_ids if lens_id not in attached]
            if missing:
                raise errors.NotFound("the lens is not attached", metadata={"lens_id": missing[0]})
            chosen = [attached[lens_id] for lens_id in lens_ids]
            for item in chosen:
                stack.enter_context(item.used())
            ids = await self._ids(asked, lease)
            found: dict[str, Reading] = {}
            for source in {item.spec.source_model_id or model_id for item in chosen}:
                read = [item for item in chosen if (item.spec.source_model_id or model_id) == source]
                held = lease if source == model_id else await stack.enter_async_context(self.pool.lease(source))
                for item, each in zip(read, await self._read(held, read, ids, asked), strict=True):
                    found[item.spec.lens_id] = each
        return Analysis(ids, [(item.spec, found[item.spec.lens_id]) for item in chosen], time.perf_counter() - start)

    async def encode(self, model_id: str, artifact_uri: str, asked: Asked) -> Analysis:
        """The text through a transcoder that is on the device for this call only."""
        start = time.perf_counter()
        async with self.pool.lease(model_id) as lease, self._files(artifact_uri) as folder:
            spec = Spec(lens_id="", kind="transcoder", folder=folder)
            lens = await self.pool.run(load_lens, spec, lease.record.base)
            ids = await self._ids(asked, lease)
            found = await self._read(lease, [Attached(spec, lens)], ids, asked)
        return Analysis(ids, [(spec, found[0])], time.perf_counter() - start)

    async def _ids(self, asked: Asked, lease: Lease) -> list[int]:
        return await self.pool.run(reading.token_ids, asked.text, asked.token_ids, lease.tokenizer, lease.facts)

    async def _read(self, lease: Lease, attached: Sequence[Attached], ids: list[int], asked: Asked) -> list[Reading]:
        """What lenses read in the activations of the leased model."""
        base, lenses = lease.record.base, [item.lens for item in attached]
        inputs = reading.on_device(ids, base)
        changes = await self._changes(lease, asked.interventions, len(ids))
        activations = await self.pool.run(reading.activations, base, lenses, inputs, changes)
        rest = (inputs, asked.top_k, asked.prefix, changes)
        return [await self.pool.run(lens.read, activations, *rest) for lens in lenses]

    async def _changes(
        self, lease: Lease, interventions: Sequence[Intervention], tokens: int | None = None
    ) -> list[Splice]:
        """What interventions do to the leased model; on its thread, where their refusals get their names."""
        return await self.pool.run(splices, interventions, lease.family, lease.facts, tokens) if interventions else []

    async def generate(self, wanted: Wanted) -> Generation:
        """Continue a prompt up to the end token, `max_new_tokens` or the end of the context.

        An extension that is not attached is attached for this call only.

        Raises:
            errors.Invalid: the prompt or an intervention does not fit the model.
        """
        start = time.perf_counter()
        async for lease, work in self._continued(wanted, TURN):
            text = decoded_text(lease, work.tokens)
        return Generation(work.tokens, text, time.perf_counter() - start)

    async def generate_stream(self, wanted: Wanted) -> AsyncGenerator[Generation, None]:
        """The same, a token at a time: each part holds what is new, text once its bytes are whole characters.

        Raises:
            errors.Invalid: as `generate`.
        """
        start = time.perf_counter()
        told, shown = 0, 0
        async with aclosing(self._continued(wanted, 1)) as turns:
            async for lease, work in turns:
                text = decoded_text(lease, work.tokens)
                whole = len(text) if work.done else len(text.rstrip(UNFINISHED))
                part = Generation(work.tokens[told:], text[shown:whole], time.perf_counter() - start)
                told, shown = len(work.tokens), max(shown, whole)
                yield part

    async def begin_stream(self, wanted: Wanted) -> tuple[Generation | None, AsyncGenerator[Generation, None]]:
        """The first part of `generate_stream`, and the rest."""
        parts = self.generate_stream(wanted)
        return await anext(parts, None), parts

    async def generate_together(self, wanted: Sequence[Wanted]) -> list[Generation]:
        """Continue several prompts on one model in the same forward passes, each with its own extension or none.

        Raises:
            errors.Invalid: they are of several models, have interventions, an extension is more than LoRA, or a prompt
                does not fit the model.
        """
        start = time.perf_counter()
        if len({each.model_id for each in wanted}) > 1 or any(each.interventions for each in wanted):
            raise errors.Invalid.of("requests", "must be of one model and without interventions")
        async with AsyncExitStack() as stack:
            begun = [await self._begun(stack, each) for each in wanted]
            lease = begun[0][0]
            keys = [each.extension for each, _ in begun]
            if not all(mixable(lease.attached[key]) for key in keys if key is not None):
                raise errors.Invalid.of("requests.extension", "must be LoRA or rsLoRA alone to share a forward")
            together = Together(lease.record.base, [work for _, work in begun], keys)
            while not together.done:
                await self.pool.run(together.turn)
        seconds = time.perf_counter() - start
        return [Generation(work.tokens, decoded_text(lease, work.tokens), seconds) for work in together.works]

    async def _continued(self, wanted: Wanted, tokens: int) -> AsyncGenerator[tuple[Lease, Continuation], None]:
        """A continuation after each turn of so many tokens."""
        async with AsyncExitStack() as stack:
            lease, work = await self._begun(stack, wanted)
            family = lease.family if wanted.interventions else None
            while not work.done:
                await lease.run(work.turn, family, tokens)
                yield lease, work

    async def _begun(self, stack: AsyncExitStack, wanted: Wanted) -> tuple[Lease, Continuation]:
        """A continuation of which nothing is made yet, and the model until the stack is closed."""
        key = await self._with_extension(stack, wanted.model_id, wanted.extension)
        lease = await stack.enter_async_context(self.pool.lease(wanted.model_id, key))
        ids = await self.pool.run(reading.token_ids, wanted.prompt, (), lease.tokenizer, lease.facts, field="prompt")
        room = lease.facts.context_length - (0 if lease.facts.encoder_decoder else len(ids))
        if room < 1:
            raise errors.Invalid.of("prompt", f"fills the model's context of {lease.facts.context_length} tokens")
        return lease, Continuation(
            base=lease.record.base,
            prompt=ids,
            max_new_tokens=min(wanted.max_new_tokens, room),
            temperature=wanted.temperature,
            seed=wanted.seed,
            splices=await self._changes(lease, wanted.interventions),
            end_ids=end_ids(lease),
        )

    async def _with_extension(
        self, stack: AsyncExitStack, model_id: str, extension: tuple[Spec, str] | None
    ) -> str | None:
        if extension is None:
            return None
        spec, artifact_uri = extension
        bring = partial(self._bring, model_id, spec, artifact_uri)
        await stack.enter_async_context(self.guests.staying(model_id, spec.lens_id, bring))
        return spec.lens_id

    async def measure_perplexity(self, model_id: str, dataset_id: str, sample_count: int, max_length: int) -> Measured:
        """Perplexity of the bare base on a dataset's first sequences.

        Raises:
            errors.Invalid: the dataset cannot be read, or none of it is usable.
        """
        start = time.perf_counter()
        record = await self.catalogue.readable(await self.catalogue.dataset(dataset_id))
        async with self.pool.lease(model_id) as lease:
            facts = lease.facts
            length = min(max_length or PERPLEXITY_TOKENS, facts.context_length)
            sequences = await self.pool.read(self._sequences, record, lease, length, sample_count)
            parts = []
            for batch in texts.plan_batches(sequences.lengths, facts.model_batch_size):
                ids, mask = sequences.padded(batch.indices, batch.length)
                parts.append(await lease.run(batch_loss, lease.model, torch.from_numpy(ids), torch.from_numpy(mask)))
        return Measured(perplexity(parts), len(sequences), time.perf_counter() - start)

    def _sequences(self, record: texts.DatasetRecord, lease: Lease, max_length: int, count: int) -> texts.Sequences:
        rows = texts.open_rows(record, self.settings.dataset_roots, self.settings.state_dir / "datasets")
        return texts.tokenize(rows, lease.tokenizer, max_length, min(count, len(rows)), lease.facts.vocab_size)

    async def empty_cache(self) -> int:
        """Give freed memory back to the device or the system; returns how many bytes that were."""
        return await self.pool.run(give_back, self.pool.device)


def decoded_text(lease: Lease, tokens: Sequence[int]) -> str:
    """The text of generated tokens; empty for a model without a tokenizer."""
    return lease.tokenizer.decode(tokens, skip_special_tokens=True) if lease.tokenizer else ""


def end_ids(lease: Lease) -> frozenset[int]:
    """Tokens that end a generation."""
    stored = lease.record.base.model.generation_config.eos_token_id
    return frozenset(stored if isinstance(stored, list) else [stored] if stored is not None else [])
