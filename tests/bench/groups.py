"""Groups on a real mesh: what sharing a base saves, and hundreds of switches between two groups under kill -9.

    python -m tests.bench.groups memory [--megabytes 1000] [--lenses 10]
    python -m tests.bench.groups switches [--megabytes 1000] [--lenses 10] [--count 200] [--kills 5]

Memory is the device process's proportional set size, as the kernel counts it; never our own ledger.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from services.client.api import ApiError
from services.client.http import HttpApi
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.runtime.mesh import read_mesh
from tests.bench.residency import synthetic
from tests.e2e.conftest import Up, run_up

WIDTH, MB = 1024, 1_000_000
TEXT = "def add(left, right):\n    return left + right\n"


@dataclass
class Bench:
    """A mesh under measurement."""

    up: Up
    api: HttpApi
    lens_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"within": [], "cross": []})

    @property
    def device(self) -> psutil.Process:
        """The process that holds the weights."""
        mesh = read_mesh(self.up.state)
        assert mesh is not None
        return psutil.Process(next(pid for name, pid in mesh.pids.items() if name.startswith("device")))

    def pss(self) -> float:
        """Bytes, in MB, that the kernel counts for the device process: its own and its share of shared pages.

        What is not pinned leaves first, and so does freed memory that the process keeps for its next forward.
        """
        for device in self.api.call("ListDevices")["devices"]:
            self.api.call("ClearDevice", id=device["name"])
        return self.device.memory_full_info().pss / MB

    def model(self, name: str, folder: str, *, pinned: bool = False) -> str:
        """A registered model."""
        files = {"model_type": "llama", "source": "local", "model_identifier": folder}
        return self.api.call("CreateModel", name=name, **files, quantization="none", pinned=pinned)["id"]

    def load(self, model_id: str) -> None:
        """Load it and wait."""
        self.api.call("LoadModel", id=model_id)
        self.ready(model_id)

    def ready(self, model_id: str) -> dict[str, Any]:
        """The model, once it is on a device."""

        def look() -> dict[str, Any] | None:
            found = self.api.call("GetModel", id=model_id)
            return found if found["status"] == "ready" else None

        return self.until(look)

    def group(self, model_id: str, lenses: int, source_id: str = "") -> tuple[str, list[str]]:
        """A group with imported transcoders, every other one reading `source_id`, where one is given."""
        group = self.api.call("CreateGroup", name="bench", model_id=model_id)["id"]
        made = []
        for number in range(lenses):
            coder = self.api.call(
                "ImportTranscoder", model_id=model_id, format="sae_lens", source="local", identifier="coder", layer=1
            )
            more = {"activation_source_model_id": source_id} if source_id and number % 2 else {}
            lens = self.api.call("AttachLens", group_id=group, kind="transcoder", transcoder_id=coder["id"], **more)
            made.append(lens["id"])
        return group, made

    def until(self, check: Any, timeout: float = 300.0) -> Any:
        """What `check` returns once it is true; a mesh that comes back is waited for."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                if found := check():
                    return found
            except ApiError as error:
                if not error.transient:
                    raise
            time.sleep(0.05)
        raise TimeoutError


@contextmanager
def running(root: Path, megabytes: int, lens_count: int, budget: int, park: int) -> Iterator[Bench]:
    """A mesh whose model root has two bases of this size, a third as their source, and a transcoder of about 64 MB."""
    models = root / "models"
    for name in ("a", "b"):
        synthetic(models / name, megabytes)
    synthetic(models / "source", max(60, megabytes // 10))
    make = torch.Generator().manual_seed(0)
    size = 8 * WIDTH
    weights = {
        "W_enc": torch.randn(WIDTH, size, generator=make),
        "b_enc": torch.zeros(size),
        "W_dec": torch.randn(size, WIDTH, generator=make) / WIDTH,
        "b_dec": torch.zeros(WIDTH),
        "threshold": torch.zeros(size),
    }
    Transcoder(TranscoderShape("topk", 64, (size,)), weights, {"layer": 1}).save(models / "coder")
    environment = {
        "LENSMESH_MODEL_ROOTS": str(models),
        "LENSMESH_DEVICE_MEMORY_LIMIT": str(budget),
        "LENSMESH_PARK_MEMORY_LIMIT": str(park),
        "LENSMESH_LOADS_PER_HOUR": "100000",
        "LENSMESH_MAX_RESIDENT_MODELS": "32",
        "LENSMESH_PREDICTIVE_PRELOAD": "false",  # what is brought between a plan and its switch is not in the plan
    }
    with run_up(root / "state", environment=environment) as up:
        bench = Bench(up, HttpApi(up.mesh.gateway, up.mesh.token))
        bench.lens_bytes = sum(tensor.nbytes for tensor in weights.values())
        yield bench


def memory(root: Path, megabytes: int, lenses: int) -> list[tuple[str, float, str]]:
    """One base with all lenses and two sources against every lens with a base of its own."""
    room = (lenses + 3) * (megabytes + 100) * MB * 2
    with running(root, megabytes, lenses, room, 0) as bench:
        empty = bench.pss()
        base, source = bench.model("base", "a", pinned=True), bench.model("source", "source", pinned=True)
        bench.load(base)
        alone = bench.pss() - empty
        bench.load(source)
        small = bench.pss() - empty - alone
        group, _ = bench.group(base, lenses, source)
        shared = bench.pss() - empty
        status = bench.api.call("GetGroupStatus", id=group)
        expected = alone + small + lenses * bench.lens_bytes / MB
        bench.api.call("DeleteGroup", id=group)
        bench.api.call("UnloadModel", id=source)
        bench.group(base, 1)
        for _ in range(lenses - 1):
            other = bench.model("base", "a", pinned=True)
            bench.load(other)
            bench.group(other, 1)
        separate = bench.pss() - empty
        saved = separate - (shared - small)
        return [
            ("one base alone", alone, ""),
            ("a second activation source", small, ""),
            (
                f"both, and {lenses} lenses of {bench.lens_bytes / MB:.1f} MB on the base",
                shared,
                f"{shared / expected - 1:+.1%} against their sum",
            ),
            (f"{lenses} bases with a lens each", separate, ""),
            (
                "saved by sharing",
                saved,
                f"{saved / separate:.0%}; the status says {status['saved_bytes'] / MB:.0f} MB",
            ),
        ]


def switches(root: Path, megabytes: int, lenses: int, count: int, kills: int) -> list[tuple[str, float, str]]:
    """Two groups where one fits, switched at random, the device process killed on the way.

    Raises:
        AssertionError: rows, plan and device do not agree.
    """
    chance = random.Random(0)
    one = int((megabytes * 1.15 + 150) * MB + lenses * 68 * MB)
    with running(root, megabytes, lenses, one, one) as bench:
        ids = [bench.model("a", "a"), bench.model("b", "b")]
        groups = [bench.group(model_id, lenses) for model_id in ids]
        at = set(chance.sample(range(count), kills))
        active: dict[str, str] = {}
        prints: dict[str, str] = {}
        planned = 0
        for turn in range(count):
            group, made = chance.choice(groups)
            lens = chance.choice(made)
            planned += _switch(bench, group, lens, checked=turn not in at)
            active[group] = lens
            model_id = ids[[each[0] for each in groups].index(group)]
            fingerprint = bench.ready(model_id)["fingerprint"]
            assert prints.setdefault(model_id, fingerprint) == fingerprint, "the base computes other bits"
            if turn in at:
                before = bench.ready(model_id)["loaded_at"]
                bench.device.send_signal(signal.SIGKILL)
                bench.until(lambda m=model_id, t=before: bench.ready(m)["loaded_at"] != t)  # else the old rows would do
                bench.until(lambda g=group: bench.api.call("GetGroupStatus", id=g)["fully_loaded"])
        _agree(bench, groups, active)
        rows = [
            (f"switch {kind}, median of {len(found)}", statistics.median(found) * 1000, "ms")
            for kind, found in bench.seconds.items()
            if found
        ]
        return [
            *rows,
            ("switches whose plan named exactly what was evicted", planned, f"of {count - kills} not killed"),
        ]


def _switch(bench: Bench, group: str, lens: str, *, checked: bool) -> bool:
    """Switch and wait; whether the plan named exactly who left."""
    plan = bench.until(lambda: bench.api.call("SwitchLens", id=group, lens_id=lens, validate_only=True))
    named = {
        (e["model_id"], e.get("lens_id", ""))
        for e in plan.get("plan", {}).get("placements", [{}])[0].get("evictions", [])
    }
    before = _on_device(bench)
    expected = {each for each in before if each in named or (each[0], "") in named}
    start = time.perf_counter()
    done = bench.until(lambda: bench.api.call("SwitchLens", id=group, lens_id=lens))
    if "job_id" in done:
        job = bench.until(lambda: _ended(bench, done["job_id"]))
        assert job["status"] == "completed", job
    bench.seconds["cross" if "job_id" in done else "within"].append(time.perf_counter() - start)
    left = before - _on_device(bench)
    if checked:
        assert left == expected, f"planned {expected}, left {left}"
    return checked


def _ended(bench: Bench, job_id: str) -> dict[str, Any] | None:
    job = bench.api.call("GetJob", id=job_id)
    return job if job["status"] in ("completed", "failed", "cancelled") else None


def _on_device(bench: Bench) -> set[tuple[str, str]]:
    """(model, lens) of every lens that is there, and (model, "") of every model."""
    devices = bench.until(lambda: bench.api.call("ListDevices")["devices"])
    found = {(model["model_id"], "") for device in devices for model in device.get("models", [])}
    for group in bench.until(lambda: bench.api.call("ListGroups")["groups"]):
        lenses = [lens for lens in group.get("lenses", []) if lens.get("residency") == "device"]
        found |= {(group["model_id"], lens["id"]) for lens in lenses}
    return found


def _agree(bench: Bench, groups: list[tuple[str, list[str]]], active: dict[str, str]) -> None:
    """Active lenses are those of the last acknowledged switches, and the ledger is the sum of what is there."""
    for group, _ in groups:
        status = bench.api.call("GetGroupStatus", id=group)
        assert status.get("active_lens_id") == active[group], status
    (device,) = [each for each in bench.api.call("ListDevices")["devices"] if each["alive"]]
    held = sum(model["memory_bytes"] for model in device.get("models", []))
    assert device["used_bytes"] == held <= device["budget_bytes"], device
    assert device.get("reserved_bytes", 0) == 0, device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "switches"))
    parser.add_argument("--megabytes", type=int, default=1000, help="size of a base")
    parser.add_argument("--lenses", type=int, default=10, help="lenses of a group")
    parser.add_argument("--count", type=int, default=200, help="switches")
    parser.add_argument("--kills", type=int, default=5, help="kill -9 of the device process among them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lensmesh-groups-") as folder:
        if given.what == "memory":
            rows = memory(Path(folder), given.megabytes, given.lenses)
        else:
            rows = switches(Path(folder), given.megabytes, given.lenses, given.count, given.kills)
    table = Table("what", "figure", "", title=f"bases of about {given.megabytes} MB, MB unless said otherwise")
    for name, figure, note in rows:
        table.add_row(name, f"{figure:.1f}", note)
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
