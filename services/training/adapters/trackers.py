"""External trackers: a training's figures go to wandb or trackio as well, and nothing that happens there matters to it.

Secrets and servers come from the tracker's own environment variables (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE, …).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

MOST_WAITING: Final = 256
"""Reports that wait for a slow tracker; further ones are dropped."""
CLOSE_SECONDS: Final = 30.0
PROJECT: Final = "lensmesh"

_log = structlog.get_logger()


class Opened(Protocol):
    """A run of a tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Keep one step's figures."""

    def finish(self) -> None:
        """Send the rest."""


class Tracker:
    """One training's figures on their way to a tracker, on a thread of its own that may fail or hang."""

    def __init__(self, name: str, open_run: Callable[[], Opened]) -> None:
        """Start it; `open_run` is called on the thread."""
        self._name, self._open = name, open_run
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def tell(self, figures: Mapping[str, Any]) -> None:
        """Hand on one report; returns at once, and drops it where too many wait."""
        try:
            self._waiting.put_nowait(dict(figures))
        except queue.Full:
            _log.warning("tracker_is_slow", tracker=self._name)

    def close(self) -> None:
        """No report follows: let it send what it has, for a while."""
        try:
            self._waiting.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            run = self._open()
            while (figures := self._waiting.get()) is not None:
                named = flat(figures)
                run.log(named, step=int(named.pop("step")))  # which trackio has another meaning for among them
            run.finish()
        except Exception as error:
            _log.warning("tracker_failed", tracker=self._name, error=type(error).__name__)
            while self._waiting.get() is not None:
                pass


def start(name: str, job_id: str, config: Mapping[str, Any], directory: Path) -> Tracker:
    """Begin to track a job; one that goes on after an interruption goes on there, too.

    Args:
        name: wandb or trackio.
        job_id: names the run.
        config: shown with it.
        directory: where it may keep files.
    """
    open_run = _wandb if name == "wandb" else _trackio
    return Tracker(name, lambda: open_run(job_id, dict(config), directory))


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures under names without structure: `fvu`, `coder_0/fvu`, `coder_0/fvu_per_prefix/1`."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, list | tuple):
            label = "coder_" if name == "coders" else f"{name}/"
            for place, item in enumerate(value):
                found |= flat({f"{label}{place}": item})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _wandb(job_id: str, config: dict[str, Any], directory: Path) -> Opened:
    wandb = import_module("wandb")
    directory.mkdir(parents=True, exist_ok=True)
    # without a key it would ask on the terminal of a service
    offline = {} if "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ else {"mode": "offline"}
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=job_id,
        name=job_id,
        config=config,
        dir=str(directory),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        **offline,
    )


def _trackio(job_id: str, config: dict[str, Any], directory: Path) -> Opened:
    os.environ.setdefault("TRACKIO_DIR", str(directory))
    trackio = import_module("trackio")
    return trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=job_id, config=config, resume="allow")
