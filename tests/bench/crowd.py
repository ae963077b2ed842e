"""Many clients switch lenses of one group at random: is every reply linearizable, and is anything left behind?

    python -m tests.bench.crowd [--clients 64] [--seconds 60]

Every client has a lens of its own, so its n-th acknowledged switch is its lens' n-th `group:switched` event; the
events' sequence is the order in which the mesh says that the switches happened.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from lensmesh.registry.v1 import jobs_pb2, jobs_pb2_grpc
from rich.console import Console
from rich.table import Table

from services.client.http import HttpApi
from tests.bench.residency import synthetic
from tests.e2e.conftest import Up, run_up


@dataclass(frozen=True)
class Switch:
    """One acknowledged switch, by the client's clock."""

    lens: str
    number: int
    began: float
    ended: float


def crowd(up: Up, group: str, lenses: list[str], seconds: float) -> list[Switch]:
    """What was acknowledged to one thread a lens, each with pauses of its own."""
    done: list[Switch] = []
    failures: list[BaseException] = []
    until = time.monotonic() + seconds

    def client(lens: str) -> None:
        api, chance, number = HttpApi(up.mesh.gateway, up.mesh.token), random.Random(lens), 0
        try:
            while time.monotonic() < until:
                began = time.monotonic()
                api.call("SwitchLens", id=group, lens_id=lens)
                done.append(Switch(lens, number, began, time.monotonic()))
                number += 1
                time.sleep(chance.expovariate(20))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(lens,)) for lens in lenses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive(), "a switch never answers"
    if failures:
        raise failures[0]
    return done


def told(up: Up, group: str, count: int) -> Iterator[str]:
    """Lenses in the order of the group's `switched` events."""
    with grpc.insecure_channel(up.mesh.grpc["registry"]) as channel:
        stub = jobs_pb2_grpc.EventServiceStub(channel)
        request = jobs_pb2.WatchRequest(topics=[f"group:{group}"], after={group: 0})
        stream = stub.Watch(request, metadata=[("authorization", f"Bearer {up.mesh.token}")], timeout=120)
        for event in stream:
            if event.event == "group:switched":
                yield event.data["lens_id"]
                count -= 1
            if count == 0:
                return


def check(done: list[Switch], order: list[str], active: str) -> None:
    """The order of events is one in which the switches can have happened.

    Raises:
        AssertionError: a switch that had been answered before another was asked for is told after it.
    """
    counted: Counter[str] = Counter()
    place: dict[tuple[str, int], int] = {}
    for position, lens in enumerate(order):
        place[lens, counted[lens]] = position
        counted[lens] += 1
    assert counted == Counter(each.lens for each in done), "events and acknowledgements differ"
    latest = -1.0
    for each in sorted(done, key=lambda each: place[each.lens, each.number]):
        assert each.ended >= latest, "an answered switch is told after one that was asked for later"
        latest = max(latest, each.began)
    assert active == order[-1], "the active lens is not the last one that was switched to"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lensmesh-crowd-") as folder:
        synthetic(Path(folder) / "models" / "base", 60)
        environment = {"LENSMESH_MODEL_ROOTS": str(Path(folder) / "models")}
        with run_up(Path(folder) / "state", environment=environment) as up:
            api = HttpApi(up.mesh.gateway, up.mesh.token)
            names = {"name": "base", "model_type": "llama", "source": "local", "model_identifier": "base"}
            model = api.call("CreateModel", **names, quantization="none")["id"]
            api.call("LoadModel", id=model)
            while api.call("GetModel", id=model)["status"] != "ready":
                time.sleep(0.1)
            group = api.call("CreateGroup", name="crowd", model_id=model)["id"]
            lenses = [api.call("AttachLens", group_id=group, kind="logit_lens")["id"] for _ in range(given.clients)]
            processes = {name: psutil.Process(pid) for name, pid in up.mesh.pids.items()}
            warm = crowd(up, group, lenses, 2)
            before = {name: process.memory_info().rss for name, process in processes.items()}
            done = crowd(up, group, lenses, given.seconds)
            grown = {name: process.memory_info().rss - before[name] for name, process in processes.items()}
            order = list(told(up, group, len(warm) + len(done)))[len(warm) :]
            check(done, order, api.call("GetGroup", id=group)["active_lens_id"])
    waits = sorted(each.ended - each.began for each in done)
    table = Table("what", "figure", title=f"{given.clients} clients for {given.seconds:.0f} s")
    table.add_row("acknowledged switches, linearizable", str(len(done)))
    table.add_row("switches a second", f"{len(done) / given.seconds:.0f}")
    table.add_row("median", f"{statistics.median(waits) * 1e3:.1f} ms")
    table.add_row("99th percentile", f"{waits[len(waits) * 99 // 100] * 1e3:.1f} ms")
    table.add_row("resident memory grown", ", ".join(f"{name} {size / 1e6:+.1f} MB" for name, size in grown.items()))
    Console().print(table)


if __name__ == "__main__":
    main()
