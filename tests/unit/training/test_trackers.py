from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import wandb

from services.kit import errors
from services.training import requests
from services.training.adapters import trackers
from tests.unit.training.test_requests import MODEL, wanted

FIGURES = {"step": 7, "loss": 0.5, "fvu_per_prefix": [0.4, 0.2], "coders": [{"layer": 1, "fvu": 0.2}], "note": "x"}


def test_figures_get_names_without_structure() -> None:
    assert trackers.flat(FIGURES) == {
        "step": 7,
        "loss": 0.5,
        "fvu_per_prefix/0": 0.4,
        "fvu_per_prefix/1": 0.2,
        "coder_0/layer": 1,
        "coder_0/fvu": 0.2,
    }


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    tracker = trackers.start("wandb", "job_1", {"layers": [1]}, tmp_path / "kept")
    for step in (1, 2, 3):
        tracker.tell({**FIGURES, "step": step})
    tracker.close()
    wandb.teardown()  # its process writes the file's end when it goes
    (kept,) = (tmp_path / "kept").rglob("run-job_1.wandb")
    content = kept.read_bytes()
    assert kept.parent.name.startswith("offline-run-")
    assert content.count(b"coder_0/fvu") >= 3


class Broken:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def log(self, figures: Any, step: int) -> None:
        self.seen.append(step)
        raise ConnectionError("no network")

    def finish(self) -> None:
        raise AssertionError("it is broken already")


def test_a_tracker_that_fails_is_nobodys_trouble() -> None:
    broken = Broken()
    tracker = trackers.Tracker("wandb", lambda: broken)
    for step in range(2 * trackers.MOST_WAITING):
        tracker.tell({"step": step})
    tracker.close()
    assert broken.seen == [0]


def test_a_tracker_that_hangs_holds_nobody_up() -> None:
    go_on = threading.Event()

    class Hanging(Broken):
        def log(self, figures: Any, step: int) -> None:
            go_on.wait()
            self.seen.append(step)

        def finish(self) -> None:
            self.seen.append(-1)

    hanging = Hanging()
    tracker = trackers.Tracker("wandb", lambda: hanging)
    for step in range(3 * trackers.MOST_WAITING):
        tracker.tell({"step": step})  # returns although nothing is taken
    go_on.set()
    tracker.close()
    assert hanging.seen[-1] == -1
    assert trackers.MOST_WAITING <= len(hanging.seen) - 1 <= trackers.MOST_WAITING + 1


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "find_spec", lambda name: None)
    with pytest.raises(errors.Unsupported, match="trackio"):
        requests.resolve(wanted(1, tracker="trackio"), MODEL, None)
    monkeypatch.setattr(requests, "find_spec", lambda name: object())
    assert requests.resolve(wanted(1, tracker="trackio"), MODEL, None).tracker == "trackio"
