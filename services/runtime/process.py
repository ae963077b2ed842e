"""One child of the supervisor: started, watched through its pidfd, stopped."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

Probe = Callable[[], Awaitable[str | None]]
"""Asks a process whether it is ready: None when it is, else what it waits for."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How one process is started, known to be ready, and stopped."""

    name: str
    argv: tuple[str, ...]
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    """The whole environment of the process."""
    directory: Path = Path("/")
    """Working directory."""
    user: int | None = None
    """User and group id to run as; None: the supervisor's own."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Asks the process to drain and end."""
    orphan_signal: signal.Signals = signal.SIGKILL
    """What the kernel sends it when the supervisor dies."""
    adopt: int | None = None
    """Process id of an instance that a killed supervisor left behind and that serves on."""


class Child:
    """A running process."""

    def __init__(self, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self._process = process
        self._exited = asyncio.Event()
        self.returncode: int | None = None
        """Exit status, negative signal number; None while it runs, and for ever if it was adopted."""
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    def start(cls, spec: ProcessSpec, log: Path) -> Child:
        """Start the process in a session of its own (a terminal's Ctrl-C is for the supervisor), output to `log`.

        Raises:
            OSError: the program cannot be executed.
        """
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, spec.orphan_signal)
            if os.getppid() != parent:
                os._exit(1)  # the supervisor died in between

        with log.open("ab") as output:
            process = subprocess.Popen(
                spec.argv,
                env=dict(spec.environment),
                cwd=spec.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=spec.user,
                group=spec.user,
                extra_groups=None if spec.user is None else [],
                preexec_fn=die_with_parent,  # noqa: PLW1509  nothing here takes a lock
            )
        return cls(process.pid, process)

    @classmethod
    def adopt(cls, pid: int) -> Child:
        """Watch a process that somebody else started.

        Raises:
            ProcessLookupError: it is gone.
        """
        return cls(pid, None)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._process is not None:
            self.returncode = self._process.wait()
        self._exited.set()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._exited.is_set()

    async def wait(self) -> None:
        """Return when the process has ended."""
        await self._exited.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it has ended."""
        if self.running:
            signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, number: signal.Signals, grace_seconds: float) -> bool:
        """Ask it to end, and kill it after `grace_seconds`; True when it went by itself."""
        self.send(number)
        try:
            await asyncio.wait_for(self.wait(), grace_seconds)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.wait()
            return False
        return True

    def describe_exit(self) -> str:
        """How it ended, in words."""
        if self.returncode is None:
            return "ended"
        if self.returncode < 0:
            return f"was ended by {signal.Signals(-self.returncode).name}"
        return f"exited with status {self.returncode}"


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, so that none is ever lost from sight.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def last_words(log: Path, lines: int = 1) -> str:
    """The last non-empty lines of a process's log, "" without any; at most 8 KiB are read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
