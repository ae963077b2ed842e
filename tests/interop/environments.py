"""Environments of their own for other tools, built once and kept for the next run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

DONE = "complete"


def interpreter_with(*requirements: str) -> Path:
    """The interpreter of an environment that holds these and what they need; installed from the package index."""
    name = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    home = Path(tempfile.gettempdir()) / f"lensmesh-interop-{name}"
    interpreter = home / "bin" / "python"
    if not (home / DONE).exists():
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *requirements], check=True)
        (home / DONE).touch()
    return interpreter
