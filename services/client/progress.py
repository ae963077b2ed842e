"""Progress bars fed by events; they go to standard error, so that standard output stays for results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.client.api import Api, ApiError, Event, follow_job, follow_load

Describe = Callable[[dict[str, Any]], str]
"""What the end of a bar says about an event's data."""


def describe_progress(data: dict[str, Any]) -> str:
    """The figures of a progress event that people follow: FVU, losses, samples, rate."""
    parts = []
    if "fvu" in data:
        parts.append(f"FVU {data['fvu']:.3f}")
    if "loss" in data:
        parts.append(f"loss {data['loss']:.3f}")
    if data.get("total_samples"):
        parts.append(f"{data.get('samples_processed', 0):,}/{data['total_samples']:,} samples")
    if data.get("tokens_per_second"):
        parts.append(f"{data['tokens_per_second']:,.0f} tokens/s")
    if data.get("waiting_for"):
        parts.append(f"waits for {data['waiting_for']}")
    return "  ".join(parts)


@contextmanager
def bar(title: str, console: Console) -> Iterator[Callable[[Event], None]]:
    """A bar for one resource; call the yielded function with each event."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console) as progress:
        task = progress.add_task(title, total=100.0, said="")

        def show(event: Event) -> None:
            said = describe_progress(event.data)
            if "progress" in event.data:
                progress.update(task, completed=float(event.data["progress"]))
            if event.name.endswith((":completed", ":ready")):
                progress.update(task, completed=100.0)
            if said:
                progress.update(task, said=said)

        yield show


def wait_for_job(api: Api, job_id: str, title: str, console: Console) -> Event:
    """Show a job's progress until it ends; its last event.

    Raises:
        ApiError: it failed or was cancelled, with its reason; or the mesh is gone.
    """
    return _wait(follow_job(api, job_id), title, console)


def wait_for_load(api: Api, model_id: str, task_id: str, console: Console) -> Event:
    """Show a load's progress until the model is ready.

    Raises:
        ApiError: it failed, with its reason; or the mesh is gone.
    """
    return _wait(follow_load(api, model_id, task_id), "load", console)


def _wait(events: Iterable[Event], title: str, console: Console) -> Event:
    with bar(title, console) as show:
        for event in events:
            show(event)
    if event.name.endswith((":failed", ":cancelled", ":unloaded")):
        code = event.data.get("error_code") or event.name.rpartition(":")[2].upper()
        raise ApiError(code, event.data.get("error_message") or event.data.get("message") or event.name)
    return event
