"""Runs the steps in their order, shows what they found, and judges the whole."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.client.api import Api, ApiError
from services.client.http import HttpApi
from services.client.output import fail, print_json
from services.client.stubs import StubApi
from services.demo.activations import extract, extract_again
from services.demo.attach import running_mesh
from services.demo.corpus import write_corpus
from services.demo.extension import extension
from services.demo.journey import Journey, Step
from services.demo.lenses import group
from services.demo.model import dataset, doctor, load
from services.demo.transcoders import evaluate, train
from services.runtime.errors import StartError
from services.runtime.keys import mint_token
from services.runtime.mesh import Mesh
from services.runtime.plan import dataset_root

STEPS: tuple[tuple[str, Callable[[Journey, Step], None]], ...] = (
    ("doctor", doctor),
    ("load", load),
    ("dataset", dataset),
    ("extract", extract),
    ("extract_again", extract_again),
    ("train", train),
    ("evaluate", evaluate),
    ("group", group),
    ("extension", extension),
)
SHIPPED_MODEL = "tiny-gpt2"
_LOADS_PER_HOUR = 1000


def run_demo(state: Path, topology: str, model: str, via: str, *, as_json: bool) -> int:
    """Run the demo; the exit status.

    Args:
        state: state directory of the mesh, started where none runs in it.
        topology: of a mesh that is started.
        model: hub model; the shipped one when empty.
        via: `http` or `stubs`.
        as_json: the last line on standard output is one JSON object, and nothing else is there.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a mesh that was started is stopped
    console = Console(stderr=as_json)
    try:
        with running_mesh(state, topology) as mesh:
            token = mint_token(state / "keys", subject="demo", loads_per_hour=_LOADS_PER_HOUR)
            api = connect(mesh, token, via)
            try:
                steps = travel(plan_journey(api, console, model))
            finally:
                api.close()
            if as_json:
                print_json({"ok": all(step.ok for step in steps), "steps": [step.to_json() for step in steps]})
            return 0 if all(step.ok for step in steps) else 1
    except StartError as error:
        fail(str(error))
        if as_json:
            print_json({"ok": False, "steps": []})
        return 1
    except KeyboardInterrupt:
        fail("interrupted")
        return 130


def connect(mesh: Mesh, token: str, via: str) -> HttpApi | StubApi:
    """The way into the mesh.

    Raises:
        StartError: there is no such way.
    """
    if via == "http":
        return HttpApi(mesh.gateway, token)
    if via == "stubs":
        return StubApi(mesh.grpc, token)
    raise StartError(f"--via is http or stubs, not {via!r}")


def plan_journey(api: Api, console: Console, model: str) -> Journey:
    """A journey with nothing done yet, on a hub model or, when that is empty, the shipped one.

    Raises:
        OSError: the dataset root cannot be written.
    """
    return Journey(
        api=api,
        console=console,
        corpus=write_corpus(dataset_root()),
        model_source="huggingface" if model else "local",
        model_identifier=model or SHIPPED_MODEL,
        thresholds=not model,
    )


def travel(journey: Journey) -> list[Step]:
    """Every step in order, and the summary; after one that could not be carried out, the rest are not tried."""
    steps: list[Step] = []
    broken = False
    for name, action in STEPS:
        steps.append(Step(name))
        if broken:
            steps[-1].missed.append("not tried")
            continue
        broken = not _take(journey, steps[-1], action)
    steps.append(_summary(journey.console, steps))
    return steps


def _take(journey: Journey, step: Step, action: Callable[[Journey, Step], None]) -> bool:
    """Carry one step out; whether that was possible."""
    journey.console.print(f"[bold]{step.name}[/bold]")
    start = time.perf_counter()
    try:
        action(journey, step)
    except ApiError as error:
        step.missed.append(str(error))
        return False
    finally:
        step.seconds = time.perf_counter() - start
        for missed in step.missed:
            journey.say(f"missed: {missed}")
    return True


def _summary(console: Console, steps: list[Step]) -> Step:
    summary = Step("summary", seconds=sum(step.seconds for step in steps))
    table = Table("step", "ok", "seconds", "figures")
    for step in steps:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in step.figures.items() if isinstance(value, float))
        table.add_row(step.name, "yes" if step.ok else "[red]no[/red]", f"{step.seconds:.1f}", shown)
    console.print(table)
    held = sum(step.ok for step in steps)
    summary.figures = {"steps": len(steps), "steps_ok": held, "total_seconds": round(summary.seconds, 3)}
    summary.check(held == len(steps), "every step's checks held")
    return summary
