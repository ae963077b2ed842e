"""What a running mesh tells others: the line that `lensmesh up --json` prints, kept in `<state>/mesh.json`."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from services.runtime.errors import AlreadyRunningError, StartError


@dataclass
class Mesh:
    """Addresses, token and process ids of a running mesh."""

    gateway: str
    """Base URL of the HTTP API."""
    token: str
    """A development token with every scope."""
    grpc: dict[str, str]
    """host:port by service."""
    pids: dict[str, int]
    """Process ids by process name."""
    metrics: dict[str, str]
    """URL of the Prometheus metrics by process name."""

    @classmethod
    def from_json(cls, text: str) -> Mesh:
        """The mesh that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """The mesh as one line."""
        return json.dumps(asdict(self))

    def write(self, state: Path) -> None:
        """Publish `mesh.json`, readable by the owner only; readers see the old or the new one, never a part."""
        staged = state / ".mesh.json"
        staged.touch(mode=0o600)
        staged.write_text(self.to_json())
        staged.rename(state / "mesh.json")


def read_mesh(state: Path) -> Mesh | None:
    """The mesh that runs in a state directory, None where none does or it is not ready yet."""
    try:
        with (state / "supervisor.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # a supervisor holds it
    except OSError:
        return None
    else:
        return None
    try:
        return Mesh.from_json((state / "mesh.json").read_text())
    except FileNotFoundError:
        return None


def open_state(state: Path) -> None:
    """Create the state directory and its parts.

    Raises:
        StartError: it cannot be written.
    """
    try:
        for part in ("keys", "logs", "artifacts", "nats"):
            (state / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = state / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartError(f"the state directory {state} is not writable: {error.strerror}") from error


def lock_state(state: Path) -> TextIO:
    """Claim a state directory for this process until the returned file is closed.

    Raises:
        AlreadyRunningError: another supervisor has it.
    """
    lock = (state / "supervisor.lock").open("a+")
    for attempt in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02 * attempt)  # `read_mesh` holds it for an instant; a supervisor for good
    else:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise AlreadyRunningError(f"a mesh already runs in {state} (supervisor process {owner})")
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    (state / "mesh.json").unlink(missing_ok=True)  # of a supervisor that was killed
    return lock
