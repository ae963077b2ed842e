"""The embedded NATS server with JetStream, on loopback, behind a token."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

from services.runtime.errors import StartError
from services.runtime.process import ProcessSpec

# Debian puts nats-server into /usr/sbin, which users may not have on PATH.
_SYSTEM_PATHS = "/usr/local/sbin:/usr/sbin:/sbin"


def find_nats_server() -> str:
    """Path of the `nats-server` binary.

    Raises:
        StartError: there is none on PATH or in the system's directories.
    """
    path = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATHS}")
    if path is None:
        raise StartError("no nats-server found: install it (apt-get install nats-server), or set LENSMESH_NATS_URL")
    return path


class EmbeddedNats:
    """A JetStream server whose streams live in the state directory."""

    def __init__(self, state: Path, port: int) -> None:
        self._state = state
        self._port = port
        self._token = (state / "keys" / "nats.token").read_text()

    @property
    def url(self) -> str:
        """Address with credentials, for LENSMESH_NATS_URL."""
        return f"nats://{self._token}@127.0.0.1:{self._port}"

    def prepare(self) -> ProcessSpec:
        """Write the configuration and say how to start the server.

        Raises:
            StartError: no nats-server.
        """
        configuration = self._state / "keys" / "nats.json"  # JSON is a subset of the server's own format
        configuration.touch(mode=0o600)
        configuration.write_text(
            json.dumps(
                {
                    "host": "127.0.0.1",
                    "port": self._port,
                    "jetstream": {"store_dir": str(self._state / "nats")},
                    "authorization": {"token": self._token},
                }
            )
        )
        return ProcessSpec(
            name="nats",
            argv=(find_nats_server(), "-c", str(configuration)),
            environment=dict(os.environ),
            probe=self._probe,
        )

    async def _probe(self) -> str | None:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                greeting = await reader.readline()
                writer.close()
        except (OSError, TimeoutError):
            return "the port to open"
        return None if b'"jetstream":true' in greeting else "JetStream"
