"""All models of one process on one device: loaded in a transaction, leased to forward passes, counted to the byte.

Between two calls every model is its bare base; an altering lens is in force only inside a call that asks for it. So a
job that holds a lease for hours and runs one batch at a time never sees what others switch in between.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from services.kit import errors
from services.residency import attachments, estimate, loading, sources
from services.residency.disk_cache import DiskCache
from services.residency.failures import insufficient_memory, translated
from services.residency.fingerprint import fingerprint
from services.residency.guests import Guests
from services.residency.lease import Lease
from services.residency.lenses import Spec
from services.residency.memory import give_back
from services.residency.park import move
from services.residency.resident import Attached, Residency, Resident, finished, recognise, remember

P = ParamSpec("P")
T = TypeVar("T")
LOADERS = 2
"""Models whose weights are read at the same time."""
READERS = 4
"""Threads for other files and the hub."""
Progress = Callable[[int, int], None]


class Pool:
    """The models of one process. All coroutines belong to one event loop."""

    def __init__(
        self, device: str, budget_bytes: int, park_bytes: int = 0, disk_cache: DiskCache | None = None
    ) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.park_bytes = park_bytes
        self._disk_cache = disk_cache
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, int] = {}
        self._coming_parked: dict[str, int] = {}
        self.guests = Guests(self)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._loaders = ThreadPoolExecutor(max_workers=LOADERS, thread_name_prefix="loader")
        self._readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="reader")

    @property
    def used_bytes(self) -> int:
        """Bytes of models and lenses on the device, measured when they came; parked ones are not on it."""
        return self._bytes("device")

    @property
    def parked_bytes(self) -> int:
        """Bytes of parked models and their lenses, and of lenses that are parked alone, in host memory."""
        alone = (attached.nbytes for resident in self._residents.values() for attached in resident.parked.values())
        return self._bytes("parked") + sum(alone)

    @property
    def reserved_bytes(self) -> int:
        """Bytes promised to loads that are going on."""
        return sum(self._loading.values())

    def _bytes(self, state: Residency) -> int:
        return sum(resident.total_bytes for resident in self._residents.values() if resident.state == state)

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that nobody holds and nobody was promised."""
        return max(0, self.budget_bytes - self.used_bytes - self.reserved_bytes)

    @property
    def residents(self) -> list[Resident]:
        """Every model, in the order they came."""
        return list(self._residents.values())

    def get(self, model_id: str) -> Resident:
        """A resident model.

        Raises:
            errors.Conflict: `WRONG_STATE`: it is not here.
        """
        if model_id not in self._residents:
            raise errors.Conflict("the model is not loaded in this process", metadata={"model_id": model_id})
        return self._residents[model_id]

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run torch work on the device's one thread, first come first served; submit one batch at a time.

        Raises:
            errors.LensmeshError: what the torch modules' errors mean; whatever else `fn` raises as it is.
        """
        return await self._call(self._thread, lambda: fn(*args, **kwargs))

    async def read(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work on files or the network, no torch, on a thread of its own.

        Raises:
            errors.LensmeshError: as `run`.
        """
        return await self._call(self._readers, lambda: fn(*args, **kwargs))

    async def _call(
        self, executor: ThreadPoolExecutor, fn: Callable[[], T], on_cancel: Callable[[], None] = lambda: None
    ) -> T:
        """Run and translate. A cancelled caller leaves only when the work has ended, so that nothing runs unowned."""

        def call() -> tuple[T | None, BaseException | None]:
            try:
                return fn(), None
            except Exception as error:
                # A traceback's frames would keep a half-loaded model alive.
                return None, (translated(error) or error).with_traceback(None)

        future = asyncio.get_running_loop().run_in_executor(executor, call)
        try:
            value, failure = await asyncio.shield(future)
        except asyncio.CancelledError:
            on_cancel()
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise
        if failure is not None:
            raise failure
        return cast(T, value)

    async def load(
        self,
        model_id: str,
        directory: Path,
        quantization: str,
        *,
        expected_digest: str = "",
        expected_fingerprint: str = "",
        parked: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> Resident:
        """Load a model; whatever goes wrong, the pool and the memory are as before.

        A model that is here already with the same quantization is returned as it is.

        Args:
            model_id: its key from now on.
            directory: its files.
            quantization: one of `quantize.QUANTIZATIONS`.
            expected_digest: what `sources.digest` of the files must be; anything when empty.
            expected_fingerprint: what the loaded model's must be; anything when empty.
            parked: whether it comes into host memory at once; off a CPU its fingerprint is what its restore gives.
            progress: told (bytes read, bytes in all) from another thread.

        Raises:
            errors.Conflict: it is loading, or here with another quantization.
            errors.Exhausted: `INSUFFICIENT_MEMORY` with both numbers, or `DEVICE_OOM`.
            errors.Failed: `MODEL_LOAD_FAILED`, `CHECKSUM_MISMATCH`, `FINGERPRINT_MISMATCH`.
            errors.Unsupported: parked, and only the device can quantise it.
        """
        if parked and self.device != "cpu" and quantization in ("int8", "int4"):
            raise errors.Unsupported(f"{quantization} weights are made on the device, and cannot come parked")
        if model_id in self._loading:
            raise errors.Conflict("the model is loading already", reason="ALREADY_LOADING")
        if model_id in self._residents:
            return self._same(self._residents[model_id], quantization)
        self._loading[model_id] = 0
        resident: Resident | None = None
        failure: errors.LensmeshError = mismatch()
        try:
            resident = await self._loaded(model_id, directory, quantization, expected_digest, progress, parked=parked)
        except OSError:
            failure = errors.Failed("the model's files cannot be read", reason="MODEL_LOAD_FAILED")
        except errors.LensmeshError as error:
            failure = error.with_traceback(None)  # its frames would keep the weights alive
        finally:
            del self._loading[model_id]
            self._coming_parked.pop(model_id, None)
        if resident is not None and (expected_fingerprint in ("", resident.fingerprint) or not resident.fingerprint):
            resident.fingerprint = resident.fingerprint or expected_fingerprint
            self._residents[model_id] = resident
            return resident
        resident = None
        await self.run(give_back, self.device)
        raise failure

    async def _loaded(
        self, model_id: str, directory: Path, quantization: str, digest: str, progress: Progress, *, parked: bool
    ) -> Resident:
        prepared = await self.run(loading.prepare, directory, quantization)
        what = (prepared.model, prepared.entries, prepared.quantization, prepared.dtype)
        needed = await self.run(estimate.laid_out, *what, self.device)
        if parked:
            self._coming_parked[model_id] = self.require_parking(needed.weights + needed.quantization_state)
        else:
            self._loading[model_id] = self.require(needed.required)
        return await self._filled(model_id, prepared, digest, progress, parked=parked)

    async def _filled(
        self, model_id: str, prepared: loading.Prepared, expected_digest: str, progress: Progress, *, parked: bool
    ) -> Resident:
        """Read the weights and the digest side by side; a cancelled caller ends the reading."""
        abort = threading.Event()

        def watched(done: int, total: int) -> None:
            if abort.is_set():
                raise errors.Unavailable("the load was cancelled", reason="CANCELLED")
            progress(done, total)

        hashing = asyncio.create_task(self.read(sources.digest, prepared.directory))
        try:
            target = "cpu" if parked else self.device
            await self._call(self._loaders, lambda: self._fill(prepared, expected_digest, watched, target), abort.set)
        finally:
            await asyncio.wait([hashing])
        if expected_digest and hashing.result() != expected_digest:
            raise errors.Failed("the model's files are not those that were registered", reason="CHECKSUM_MISMATCH")
        return await self.run(finished, model_id, prepared, hashing.result(), self.device if parked else None)

    def _fill(self, prepared: loading.Prepared, digest: str, progress: Progress, target: str) -> None:
        """Quantise once: what `digest` names is read as it was quantised before, or kept for the next load."""
        cache = self._disk_cache if digest and prepared.quantization in ("int8", "int4") else None
        kept = cache.find(digest, prepared.quantization, self.device) if cache is not None else None
        loading.fill(prepared, target, progress, kept)
        if cache is not None and kept is None:
            cache.keep(prepared.model, digest, prepared.quantization, self.device)

    def _same(self, resident: Resident, quantization: str) -> Resident:
        if resident.quantization != quantization:
            raise errors.Conflict(
                f"the model is loaded as {resident.quantization}; unload it to load it as {quantization}",
                metadata={"quantization": resident.quantization},
            )
        return resident

    def require(self, required: int) -> int:
        """Raises errors.Exhausted, `INSUFFICIENT_MEMORY`, when the budget has fewer bytes left; else these bytes."""
        available = self.budget_bytes - self.used_bytes - self.reserved_bytes
        if required > available:
            raise insufficient_memory(required, available)
        return required

    def require_parking(self, required: int) -> int:
        """The same for bytes of host memory that may still be parked."""
        available = self.park_bytes - self.parked_bytes - sum(self._coming_parked.values())
        if required > available:
            raise insufficient_memory(required, available)
        return required

    @asynccontextmanager
    async def lease(self, model_id: str, extension: str | None = None) -> AsyncIterator[Lease]:
        """Keep a model on the device until the block ends.

        Args:
            model_id: a resident model.
            extension: id of an attached extension that is in force inside `Lease.run`.

        Raises:
            errors.Conflict: the model is not here, or parked.
            errors.NotFound: the extension is not attached.
        """
        resident = self.get(model_id)
        if resident.state != "device" or resident.leaving:
            raise errors.Conflict("the model is parked or leaving", metadata={"model_id": model_id})
        attached = resident.lenses.get(extension) if extension is not None else None
        if extension is not None and (attached is None or not attached.lens.altering):
            raise errors.NotFound("the extension is not attached", metadata={"lens_id": extension})
        resident.enter()
        try:
            with attached.used() if attached is not None else nullcontext():
                yield Lease(resident, extension, self.run)
        finally:
            resident.leave()

    async def unload(self, model_id: str, wait_seconds: float = 0) -> int:
        """Take a model and its lenses away; returns the bytes that came back. Nothing to do is no error.

        Raises:
            errors.Conflict: `IN_USE`: it is still leased after `wait_seconds`.
        """
        resident = self._residents.get(model_id)
        if resident is None:
            return 0
        async with self._leaving(resident, wait_seconds):
            freed = resident.total_bytes
            self._residents.pop(model_id, None)
            resident.lenses.clear()
            resident.parked.clear()
        del resident
        await self.run(give_back, self.device)
        return freed

    @asynccontextmanager
    async def _leaving(self, resident: Resident, wait_seconds: float) -> AsyncIterator[None]:
        """Nobody holds the model inside the block, and nobody gets a new lease.

        Raises:
            errors.Conflict: `IN_USE`: it is still leased after `wait_seconds`.
        """
        resident.leaving = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await resident.idle.wait()
            if resident.leases:
                raise errors.Conflict(
                    f"{resident.leases} leases are held on the model",
                    reason="IN_USE",
                    metadata={"model_id": resident.model_id, "leases": resident.leases},
                )
            yield
        finally:
            resident.leaving = False

    async def park(self, model_id: str) -> int:
        """Move a model and its lenses to host memory; returns the bytes that the device's budget got back.

        On a CPU nothing moves: the bytes count as parked instead of as the device's.

        Raises:
            errors.Conflict: `IN_USE`.
            errors.Exhausted: `INSUFFICIENT_MEMORY`: they are more than may be parked; it stays on the device.
        """
        return await self._move(self.get(model_id), "parked")

    async def restore(self, model_id: str) -> Resident:
        """Move a parked model back; its bytes must be what they were, and its fingerprints, with each extension too.

        Raises:
            errors.Exhausted: `INSUFFICIENT_MEMORY` or `DEVICE_OOM`; it stays parked.
            errors.Failed: `FINGERPRINT_MISMATCH`; the model is dropped.
        """
        resident = self.get(model_id)
        try:
            await self._move(resident, "device")
        except errors.Failed:
            await self.unload(model_id)
            raise
        return resident

    async def _move(self, resident: Resident, state: Residency) -> int:
        async with resident.lock:
            if resident.state == state:
                return 0
            async with self._leaving(resident, 0):
                before = self.used_bytes
                if state == "device":
                    self.require(resident.total_bytes)
                else:
                    self.require_parking(resident.total_bytes)
                await self._bring(resident, state)
                if state == "device":
                    await self._check_restored(resident)
                return before - self.used_bytes

    async def _bring(self, resident: Resident, state: Residency) -> None:
        if self.device != "cpu":
            origin, target = ("cpu", self.device) if state == "device" else (self.device, "cpu")
            await self.run(self._relocate, resident, origin, target)
        resident.state = state

    def _relocate(self, resident: Resident, origin: str, target: str) -> None:
        parts: list[Resident | Attached] = [resident, *resident.lenses.values()]
        if target == "cpu":
            remember(parts)
        try:
            move(resident.base.model, [attached.lens for attached in resident.lenses.values()], origin, target)
        finally:
            give_back(self.device)
        if target != "cpu":
            recognise(parts)

    async def _check_restored(self, resident: Resident) -> None:
        """Where there is no memory to compute it, the model is parked again: it must not be used unchecked."""
        try:
            await self.verify(resident, list(resident.lenses.values()))
        except errors.Failed:
            raise
        except BaseException:
            await self._bring(resident, "parked")
            raise

    async def attach(self, model_id: str, spec: Spec, *, parked: bool = False) -> Attached:
        """Bring a lens to a resident model, or a parked one; one that is attached from the same files stays as it is.

        Other files under the same id (an extension that was trained on) take the place of the old ones. One that is
        parked alone is moved back, its files unread; the model must then compute with it what it did.

        Raises:
            errors.Conflict: `LENS_INCOMPATIBLE` with both values, the model is not there, or `IN_USE`.
            errors.Failed: its files cannot be used, or attaching changed the base.
        """
        return await attachments.attach(self, model_id, spec, parked=parked)

    async def detach(self, model_id: str, lens_id: str, *, park: bool = False) -> int:
        """Take a lens off, to `park` it in host memory or for good; returns its bytes. Nothing to do is no error.

        Raises:
            errors.Conflict: `IN_USE`: a call uses it.
            errors.Exhausted: `INSUFFICIENT_MEMORY`: it is more than may be parked; it stays on the device.
            errors.NotFound: it is to be parked, and is not there.
            errors.Unsupported: it is to be parked, and reads another model.
            errors.Failed: `FINGERPRINT_MISMATCH`: the base is not what it was.
        """
        return await attachments.detach(self, model_id, lens_id, park=park)

    async def switch(self, model_id: str, lens_id: str | None) -> float:
        """Make an attached lens the active one, or none; returns the seconds it took.

        Raises:
            errors.NotFound: the lens is not attached.
        """
        start = time.perf_counter()
        async with self.lease(model_id) as lease, lease.record.lock:
            resident = lease.record
            if lens_id is not None and lens_id not in resident.lenses:
                raise errors.NotFound("the lens is not attached", metadata={"lens_id": lens_id})
            resident.active = lens_id
            if lens_id is not None:
                resident.lenses[lens_id].last_used = time.monotonic()
        return time.perf_counter() - start

    async def verify(self, resident: Resident, lenses: Sequence[Attached] = ()) -> None:
        """Compare fingerprints, of the base and with each of these lenses that alters it; the first ones are kept.

        Raises:
            errors.Failed: `FINGERPRINT_MISMATCH`.
        """
        altering = [attached for attached in lenses if attached.lens.altering]
        checks: list[Resident | Attached] = [resident, *altering]
        for checked in checks:
            lens_id = checked.spec.lens_id if isinstance(checked, Attached) else None
            found = await self.run(_fingerprint, resident, lens_id)
            checked.fingerprint = checked.fingerprint or found  # what came parked has none at first
            if found != checked.fingerprint:
                raise mismatch()

    async def close(self) -> None:
        """Drop every model and end the threads; running work is waited for."""
        self._residents.clear()
        for executor in (self._readers, self._loaders, self._thread):
            await asyncio.to_thread(executor.shutdown)


def mismatch() -> errors.Failed:
    """The fixed-input forward gives other bits than it must."""
    return errors.Failed("the model computes other bits than before", reason="FINGERPRINT_MISMATCH")


def _fingerprint(resident: Resident, lens_id: str | None) -> str:
    with resident.base.extensions.using(lens_id):
        return fingerprint(resident.base.model)
