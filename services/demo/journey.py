"""What the steps of the demo share: the way into the mesh, what earlier steps made, and how a step judges itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from services.client.api import Api, Event
from services.client.progress import wait_for_job, wait_for_load
from services.demo.corpus import Corpus

LAYERS = (1, 2)
"""Layers whose MLPs are read; the second one's transcoder is the demo's headline."""
HEADLINE_LAYER = 2
TOKENS = 409_600
"""Tokens to extract."""


@dataclass
class Step:
    """One step's outcome."""

    name: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    """Checks that did not hold, in words."""

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.missed

    def check(self, held: bool, words: str) -> None:
        """Require something of the figures."""
        if not held:
            self.missed.append(words)

    def to_json(self) -> dict[str, Any]:
        """The step as the demo's JSON shows it."""
        missed = {"missed": self.missed} if self.missed else {}
        return {"name": self.name, "ok": self.ok, "seconds": round(self.seconds, 3), "figures": self.figures | missed}


@dataclass
class Journey:
    """One run of the demo."""

    api: Api
    console: Console
    """For bars and remarks."""
    corpus: Corpus
    model_source: str
    model_identifier: str
    thresholds: bool
    """Whether the figures of the shipped model must be reached; another model has other ones."""
    tokens: int = TOKENS
    """Tokens to extract; the training goes over them twice."""
    evaluation_batches: int = 64
    """Held-out batches of each layer's evaluation."""
    extension_steps: int = 40
    """Steps of the extension's training."""
    model_id: str = ""
    train_dataset_id: str = ""
    held_out_dataset_id: str = ""
    extraction: dict[str, Any] = field(default_factory=dict)
    transcoders: dict[int, str] = field(default_factory=dict)
    """Transcoder ids by layer."""
    group_id: str = ""
    logit_lens_id: str = ""

    def say(self, text: str) -> None:
        """A remark for people."""
        self.console.print(f"  {text}", highlight=False, markup=False)

    def load(self, quantization: str) -> dict[str, Any]:
        """Load the model and wait until it is ready; the model."""
        started = self.api.call("LoadModel", id=self.model_id, quantization=quantization)
        if started["status"] == "loading":
            wait_for_load(self.api, self.model_id, started["task_id"], self.console)
        return self.api.call("GetModel", id=self.model_id)

    def unload(self) -> None:
        """Take the model off its device, after forwards that still use it."""
        self.api.call("UnloadModel", id=self.model_id, wait_seconds=60)

    def wait(self, job_id: str, title: str) -> Event:
        """Wait for a job under a bar."""
        return wait_for_job(self.api, job_id, title, self.console)


def pick(source: dict[str, Any], *names: str) -> dict[str, Any]:
    """The named figures of a reply, those that it has."""
    return {name: source[name] for name in names if name in source}
