"""Descendants that outlive their parent are the classic leak of a supervisor; a lifeline ends them.

The parent listens on a socket and never writes. Whoever inherits `LENSMESH_LIFELINE` connects and reads to end of file,
which comes exactly when the parent is gone, however it died. PR_SET_PDEATHSIG reaches direct children only; a lifeline
also reaches the ranks that torchrun starts in sessions of their own: it travels as a name and not as a descriptor.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import threading
import time

VARIABLE = "LENSMESH_LIFELINE"


class Lifeline:
    """The parent's end: lives as long as the process, accepts and keeps every follower."""

    def __init__(self) -> None:
        self.name = f"lensmesh-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Abstract address: no file to clean up after a kill, and no limit of 107 characters on state directories.
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Accept followers from now on; those that connected earlier wait in the backlog."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(asyncio.Protocol, sock=self._listener)

    def environment(self) -> dict[str, str]:
        """Variables that make a child a follower."""
        return {VARIABLE: self.name}

    def close(self) -> None:
        """Let every follower go: they read end of file and end."""
        if self._server is None:
            self._listener.close()
        else:
            self._server.close()


def follow(grace_seconds: float = 15.0) -> None:
    """End this process when the owner of the inherited lifeline is gone; does nothing where none was inherited.

    The process gets SIGTERM first, so that it can drain, and ends for certain `grace_seconds` later.
    """
    name = os.environ.get(VARIABLE)
    if name:
        threading.Thread(target=_read_to_end, args=(name, grace_seconds), name="lifeline", daemon=True).start()


def _read_to_end(name: str, grace_seconds: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(f"\0{name}")
            while connection.recv(1):
                pass
        except OSError:
            pass  # refused or reset: the owner is gone as well
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os._exit(1)
