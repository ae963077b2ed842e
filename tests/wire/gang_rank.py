"""A rank for tests of the launcher: tells its process id, then waits to be ended, or ends as it is told."""

from __future__ import annotations

import os
import signal
import sys

from services.residency import gang

gang.die_with_parent()
os.write(1, f"{gang.rank()} {os.getpid()} {os.environ['WORLD_SIZE']}\n".encode())
if gang.rank() == 0:
    sys.exit(int(sys.stdin.buffer.readline() or 0))
signal.pause()
