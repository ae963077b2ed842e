"""`lensmesh up`: a whole mesh on this machine, from an empty directory to a drained stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from services.kit import migrate
from services.kit.errors import LensmeshError
from services.runtime.errors import StartError
from services.runtime.keys import ensure_keys, mint_token
from services.runtime.lifeline import Lifeline
from services.runtime.mesh import Mesh, lock_state, open_state
from services.runtime.metrics import serve_metrics
from services.runtime.nats import EmbeddedNats
from services.runtime.plan import connectable, device_spec, gateway_spec, make_plan, registry_spec
from services.runtime.postgres import EmbeddedPostgres
from services.runtime.process import ProcessSpec, become_subreaper
from services.runtime.supervisor import Supervisor
from services.runtime.topology import Topology

TOKEN_SECONDS = 30 * 86_400.0


async def up(
    topology: Topology,
    state: Path,
    http: tuple[str, int],
    announce: Callable[[Mesh], None],
    report: Callable[[str], None],
) -> list[str]:
    """Run a mesh until SIGINT, SIGTERM or SIGHUP, then drain it; a second signal kills what still drains.

    Args:
        topology: its processes.
        state: the state directory, created where missing.
        http: host and port of the gateway; port 0 takes a free one.
        announce: told once, when everything is ready.
        report: told one line about every crash, restart and give-up.

    Returns:
        Names of the processes that were given up meanwhile.

    Raises:
        StartError: the mesh cannot start; nothing of it is left running.
    """
    open_state(state)
    with lock_state(state):
        ensure_keys(state / "keys")
        mesh = _Mesh(topology, state, http, report)
        try:
            return await mesh.run(announce)
        finally:
            (state / "mesh.json").unlink(missing_ok=True)


class _Mesh:
    """One run of `up`."""

    def __init__(self, topology: Topology, state: Path, http: tuple[str, int], report: Callable[[str], None]) -> None:
        self._state = state
        self._lifeline = Lifeline()
        self._plan = make_plan(topology, state, http, self._lifeline.environment())
        self._supervisor = Supervisor(state / "logs", report, self._publish)
        self._token = mint_token(state / "keys", subject="developer", expires_seconds=TOKEN_SECONDS)
        self._ready = False

    async def run(self, announce: Callable[[Mesh], None]) -> list[str]:
        become_subreaper()
        await self._lifeline.open()
        stopping = self._listen_for_signals()
        backends = await self._prepare_backends()
        async with self._supervisor:
            start = asyncio.create_task(self._start(backends))
            stop = asyncio.create_task(stopping.wait())
            await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                await start
                announce(self._describe())
                await stop
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return self._supervisor.failed

    def _listen_for_signals(self) -> asyncio.Event:
        stopping = asyncio.Event()

        def on_signal() -> None:
            if stopping.is_set():
                self._supervisor.kill()
            stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        return stopping

    async def _prepare_backends(self) -> list[ProcessSpec]:
        """Specs of the embedded database and broker, where the environment names no other ones."""
        specs: list[ProcessSpec] = []
        if not self._plan.environment.get("LENSMESH_NATS_URL"):
            nats = EmbeddedNats(self._state, self._plan.nats_port)
            specs.append(nats.prepare())
            self._plan.environment["LENSMESH_NATS_URL"] = nats.url
        if not self._plan.environment.get("LENSMESH_DATABASE_URL"):
            postgres = EmbeddedPostgres(self._state, self._plan.postgres_port)
            specs.append(await postgres.prepare())
            self._plan.environment["LENSMESH_DATABASE_URL"] = postgres.url
        return specs

    async def _start(self, backends: list[ProcessSpec]) -> None:
        serve_metrics(self._plan.metrics["supervisor"], self._supervisor)
        await self._supervisor.start(*backends)
        await _migrate(self._plan.environment["LENSMESH_DATABASE_URL"])
        await self._supervisor.start(registry_spec(self._plan))
        await self._supervisor.start(*(device_spec(self._plan, one) for one in self._plan.topology.processes))
        await self._supervisor.start(gateway_spec(self._plan))
        self._ready = True
        self._publish()

    def _publish(self) -> None:
        if self._ready:
            self._describe().write(self._state)

    def _describe(self) -> Mesh:
        gateway = f"http://{connectable(self._plan.http)}"
        metrics = {name: f"http://{address}/metrics" for name, address in self._plan.metrics.items()}
        return Mesh(
            gateway=gateway,
            token=self._token,
            grpc=self._plan.addresses(),
            pids={"supervisor": os.getpid(), **self._supervisor.pids},
            metrics={**metrics, "gateway": f"{gateway}/metrics"},
        )


async def _migrate(url: str) -> None:
    try:
        await migrate.upgrade(url)
    except LensmeshError as error:
        raise StartError(f"the database at {urlsplit(url).hostname} cannot be used: {error.message}") from error
