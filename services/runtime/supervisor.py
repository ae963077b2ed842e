"""Keeps processes running: starts them in stages, restarts what crashes, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.runtime.backoff import RestartPolicy
from services.runtime.errors import StartError
from services.runtime.process import Child, ProcessSpec, last_words

_PROBE_SECONDS = 0.1
_ORPHAN_SCAN_SECONDS = 1.0


@dataclass
class Kept:
    """One process of the mesh and its history."""

    spec: ProcessSpec
    log: Path
    child: Child
    policy: RestartPolicy
    restarts: int = 0
    failed: bool = False
    """It crashed too often and is no longer started."""


class Supervisor:
    """Parent and subreaper of every process of a mesh; use as an async context manager, leaving it stops them all."""

    def __init__(
        self,
        logs: Path,
        report: Callable[[str], None],
        changed: Callable[[], None] = lambda: None,
        *,
        ready_seconds: float = 180.0,
        grace_seconds: float = 15.0,
        policy: Callable[[], RestartPolicy] = RestartPolicy,
    ) -> None:
        """Prepare to supervise; nothing is started yet.

        Args:
            logs: directory of the processes' output, one file each.
            report: told one line about every crash, restart and give-up.
            changed: called after the set of running process ids changed.
            ready_seconds: how long a process may take to become ready the first time.
            grace_seconds: how long a process may drain before it is killed.
            policy: makes the restart policy of each process.
        """
        self.kept: dict[str, Kept] = {}
        self._stages: list[list[Kept]] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._logs = logs
        self._report = report
        self._changed = changed
        self._ready_seconds = ready_seconds
        self._grace_seconds = grace_seconds
        self._policy = policy

    async def __aenter__(self) -> Supervisor:
        self._keepers.append(asyncio.create_task(self._end_orphans()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, of what runs now."""
        return {name: kept.child.pid for name, kept in self.kept.items() if kept.child.running}

    @property
    def failed(self) -> list[str]:
        """Names of the processes that were given up."""
        return [name for name, kept in self.kept.items() if kept.failed]

    async def start(self, *specs: ProcessSpec) -> None:
        """Start one stage and return when every process of it is ready; stages stop in reverse order.

        Raises:
            StartError: a process cannot be executed, ends before it is ready, or is not ready in time.
        """
        stage: list[Kept] = []
        self._stages.append(stage)
        for spec in specs:
            log = self._logs / f"{spec.name}.log"
            try:
                child = Child.start(spec, log) if spec.adopt is None else Child.adopt(spec.adopt)
            except OSError as error:
                raise StartError(f"{spec.name} cannot be started: {error}") from error
            stage.append(Kept(spec, log, child, self._policy()))
            self.kept[spec.name] = stage[-1]
        try:
            async with asyncio.TaskGroup() as group:
                for kept in stage:
                    group.create_task(self._first_ready(kept))
        except* StartError as several:
            raise several.exceptions[0] from None
        self._keepers += [asyncio.create_task(self._keep(kept)) for kept in stage]

    async def stop(self) -> None:
        """Drain and end every process, the last stage first; nothing of the mesh runs afterwards."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._stop(kept) for kept in stage))
        while _reap(set()):  # noqa: ASYNC110  the kernel offers no event for it
            await asyncio.sleep(_PROBE_SECONDS)

    def kill(self) -> None:
        """End every process at once, without a drain; `stop` still has to be awaited."""
        for kept in self.kept.values():
            kept.child.send(signal.SIGKILL)

    async def _stop(self, kept: Kept) -> None:
        if kept.child.running and not await kept.child.stop(kept.spec.stop_signal, self._grace_seconds):
            self._report(f"{kept.spec.name} did not drain within {self._grace_seconds:g} s and was killed")

    async def _first_ready(self, kept: Kept) -> None:
        try:
            async with asyncio.timeout(self._ready_seconds):
                missing = await self._until_ready(kept)
        except TimeoutError:
            missing = await kept.spec.probe() or "nothing"
            raise StartError(
                f"{kept.spec.name} is not ready after {self._ready_seconds:g} s, it waits for: {missing}"
            ) from None
        if missing is not None:
            raise StartError(f"{kept.spec.name} {missing}; its log is {kept.log}")

    async def _until_ready(self, kept: Kept) -> str | None:
        """None when the process is ready; how it ended when it did so before."""
        while kept.child.running:
            if await kept.spec.probe() is None and kept.child.running:
                return None
            await asyncio.sleep(_PROBE_SECONDS)
        return _obituary(kept)

    async def _keep(self, kept: Kept) -> None:
        name = kept.spec.name
        while True:
            await kept.child.wait()
            delay = kept.policy.crashed(asyncio.get_running_loop().time())
            end = _obituary(kept)
            if delay is None:
                kept.failed = True
                self._report(
                    f"{name} {end}; it crashed {kept.policy.limit} times within minutes and is given up: failed"
                )
                self._changed()
                return
            self._report(f"{name} {end}; it is started again in {delay:g} s")
            self._changed()
            await asyncio.sleep(delay)
            kept.restarts += 1
            try:
                kept.child = Child.start(kept.spec, kept.log)
            except OSError as error:
                self._report(f"{name} cannot be started: {error}")
                continue
            self._changed()
            if await self._until_ready(kept) is None:
                self._report(f"{name} is ready again")

    async def _end_orphans(self) -> None:
        """Kill descendants whose parent has died (a subreaper's duty) and collect their exit statuses."""
        while True:
            await asyncio.sleep(_ORPHAN_SCAN_SECONDS)
            known = {kept.child.pid for kept in self.kept.values() if kept.child.running}
            _reap(known)


def _reap(known: set[int]) -> int:
    """End and collect the children of this process that are not `known`, orphans of one that died; their number."""
    orphans = [child for child in psutil.Process().children() if child.pid not in known]
    for orphan in orphans:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
        with suppress(ChildProcessError):
            os.waitpid(orphan.pid, os.WNOHANG)
    return len(orphans)


def _obituary(kept: Kept) -> str:
    said = last_words(kept.log) if kept.child.returncode else ""
    return f"{kept.child.describe_exit()} ({said})" if said else kept.child.describe_exit()
